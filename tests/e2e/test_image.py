"""The image's start, as its Dockerfile says it, with this interpreter's programs in place of the image's.

What these tests do not do is install: `make replay-image` does, and serves a completion.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.replay_image import ROOT, Container, free_port, read_stages, serve_one_completion
from tests.support import save_tiny_model
from vblora.integrations.gguf_cache import cache_dir

OPEN = {"VBLORA_ALLOW_UNAUTHENTICATED": "true", "HF_HUB_OFFLINE": "1"}
DEMO = {**OPEN, "VBLORA_MODEL": "demo"}
SECONDS = 120
FULL = 'mount -t tmpfs -o size=1m,mode=1777 none "$0" && exec "$@"'


@pytest.fixture
def container(tmp_path: Path) -> Container:
    return Container.of(read_stages(ROOT / "Dockerfile")[-1], tmp_path, Path(sys.executable).parent)


def refused(container: Container, given: dict[str, str], *before: str) -> tuple[int, str]:
    """The exit status and the last line of a start that fails; `before` is a program which starts it."""
    process = container.start({**given, "VBLORA_PORT": str(free_port())}, before)
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert "Traceback" not in output
    return process.returncode, output.strip().splitlines()[-1]


def test_the_demo_is_served_from_a_converted_model(container: Container) -> None:
    data, cache = container.volumes
    for kept in cache_dir().iterdir():
        (cache / kept.name).symlink_to(kept)
    assert serve_one_completion(container)
    assert list(data.iterdir())
    assert not list(container.root.glob("opt/*"))


def test_a_model_of_a_mounted_folder_is_served(container: Container, tmp_path: Path) -> None:
    assert serve_one_completion(container, str(save_tiny_model(tmp_path / "model")))


def test_without_a_model(container: Container) -> None:
    status, told = refused(container, OPEN)
    assert (status, told) == (2, "vblora-serve: model is required: give MODEL, or set VBLORA_MODEL")


def test_open_to_other_machines_only_on_purpose(container: Container) -> None:
    status, told = refused(container, {"VBLORA_MODEL": "demo"})
    assert status == 2
    assert "host 0.0.0.0 is reachable from other machines" in told
    assert "--allow-unauthenticated" in told


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nobody/has-this", "cannot load the base model 'nobody/has-this'"),
        ("/models/absent", "no base model '/models/absent': no such folder"),
        ("/models/absent.gguf", "cannot read /models/absent.gguf: No such file"),
    ],
)
def test_with_an_unknown_model(model: str, words: str, container: Container) -> None:
    status, told = refused(container, {**OPEN, "VBLORA_MODEL": model})
    assert status == 1
    assert words in told


@pytest.fixture
def read_only(container: Container) -> Iterator[Path]:
    """The cache folder, which nobody may write."""
    _, cache = container.volumes
    cache.chmod(0o555)
    yield cache
    cache.chmod(0o755)


def test_with_a_read_only_cache(container: Container, read_only: Path) -> None:
    status, told = refused(container, DEMO)
    assert status == 1
    assert f"cannot keep the converted base model in {read_only}" in told
    assert "Permission denied" in told
    assert "VBLORA_CACHE_DIR" in told


def test_with_a_full_cache(container: Container) -> None:
    _, cache = container.volumes
    own_mounts = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    status, told = refused(container, DEMO, *own_mounts, "sh", "-c", FULL, str(cache))
    assert status == 1
    assert f"cannot keep the converted base model in {cache}" in told
    assert "No space left on device" in told
    assert "free some space there, or name another folder in VBLORA_CACHE_DIR" in told


def test_with_a_read_only_data_folder(container: Container, tmp_path: Path) -> None:
    data, _ = container.volumes
    data.chmod(0o555)
    try:
        status, told = refused(container, {**OPEN, "VBLORA_MODEL": str(save_tiny_model(tmp_path / "model"))})
    finally:
        data.chmod(0o755)
    assert status == 1
    assert "the registry at sqlite:" in told
    assert "registry.db cannot be used: unable to open database file" in told


def test_the_health_check_fails_while_nothing_serves(container: Container) -> None:
    assert not container.healthy({"VBLORA_PORT": str(free_port())})
