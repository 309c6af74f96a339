"""The replay of a Dockerfile: small ones, whose steps really run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploy.replay_image import (
    ROOT,
    Build,
    Container,
    ReplayError,
    Stage,
    Step,
    below,
    environment_of,
    read_stages,
)

SMALL = """
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm AS build
ARG WORD=hello
ENV PLACE=/opt/vblora
WORKDIR /src
COPY greeting.txt names ./
RUN mkdir -p "$PLACE" && cat greeting.txt first.txt \\
    > /opt/vblora/said && echo "$WORD" >> /opt/vblora/said
FROM python:${PYTHON}-slim-bookworm
COPY --from=build /opt/vblora /opt/vblora
RUN useradd nobody-shall-make-this-account
USER 10001:10001
VOLUME ["/var/lib/vblora"]
ENTRYPOINT ["cat"]
CMD ["/opt/vblora/said"]
"""


def build(folder: Path, dockerfile: str = SMALL, ignore: str = "*\n!greeting.txt\n!names\n") -> Build:
    context = folder / "context"
    (context / "names").mkdir(parents=True)
    (context / "names" / "first.txt").write_text("Anna\n")
    (context / "greeting.txt").write_text("good morning\n")
    (context / ".dockerignore").write_text(ignore)
    (context / "Dockerfile").write_text(dockerfile)
    return Build(folder, context)


def stages(text: str, folder: Path) -> list[Stage]:
    (folder / "Dockerfile").write_text(text)
    return read_stages(folder / "Dockerfile")


def test_the_steps_run_stage_by_stage_and_only_what_is_copied_arrives(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small = build(tmp_path)
    small.run(read_stages(tmp_path / "context" / "Dockerfile"))
    assert (small.root / "opt/vblora/said").read_text() == "good morning\nAnna\nhello\n"
    assert not (small.root / "src").exists()
    assert (tmp_path / "build" / "src" / "first.txt").exists()
    assert "not replayed, it makes accounts" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("cat greeting.txt", "cat nothing.txt"), "status 1 of"),
        (("WORKDIR /src", "ONBUILD RUN true"), "this script does not know ONBUILD"),
        (("PYTHON=3.11", "PYTHON=2.7"), r"run this with the Python of python:2\.7-slim-bookworm"),
        (("COPY greeting.txt names", "COPY greeting.txt names secrets"), r"\.dockerignore keeps secrets from"),
    ],
)
def test_a_step_that_fails_ends_the_replay(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    small = build(tmp_path, SMALL.replace(*change))
    with pytest.raises(ReplayError, match=message):
        small.run(read_stages(tmp_path / "context" / "Dockerfile"))


def test_the_start_is_that_of_the_last_stage(tmp_path: Path) -> None:
    last = stages(SMALL, tmp_path)[-1]
    assert last.command("ENTRYPOINT") + last.command("CMD") == ["cat", "/opt/vblora/said"]
    with pytest.raises(ReplayError, match="the stage final has no HEALTHCHECK"):
        last.command("HEALTHCHECK")
    container = Container.of(last, tmp_path)
    assert container.user == (10001, 10001)
    assert [volume.is_dir() for volume in container.volumes] == [True]


def test_only_the_images_folders_are_moved() -> None:
    moved = below(Path("/tmp/x"), "/src:/opt/vblora/bin:/usr/bin a/src /srcs ./src =/var/lib/vblora")
    assert moved == "/tmp/x/src:/tmp/x/opt/vblora/bin:/usr/bin a/src /srcs ./src =/tmp/x/var/lib/vblora"


def test_env_builds_on_what_was_there() -> None:
    stage = Stage("", "", [Step("ENV", 'A=1 B="two words"'), Step("ENV", "PATH=/opt/vblora/bin:$PATH")])
    assert environment_of(stage, {"PATH": "/bin"}) == {"A": "1", "B": "two words", "PATH": "/opt/vblora/bin:/bin"}


def test_a_container_sees_nothing_of_this_machines_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VBLORA_MODEL", "of this machine")
    container = Container.of(read_stages(ROOT / "Dockerfile")[-1], tmp_path)
    environment = container.environment({"VBLORA_PORT": "9000"})
    assert "VBLORA_MODEL" not in environment
    assert environment["VBLORA_PORT"] == "9000"
    assert environment["VBLORA_DATA_DIR"] == f"{tmp_path}/var/lib/vblora"
    assert re.match(rf"{tmp_path}/opt/vblora/bin:", environment["PATH"])
