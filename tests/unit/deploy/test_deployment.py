"""Dockerfile, compose file and Prometheus' configuration agree with each other and with the settings."""

from __future__ import annotations

import json
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.replay_image import FOLDERS, ROOT, environment_of, read_stages
from serving.settings import ENV_PREFIX, load_settings

IMAGE = read_stages(ROOT / "Dockerfile")[-1]
IMAGE_ENVIRONMENT = environment_of(IMAGE, {"PATH": "/bin"})
NOT_SETTINGS = {"VBLORA_CACHE_DIR"}


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    services: dict[str, Any] = read("deploy/compose.yaml")["services"]
    return services


def container_environment(compose: dict[str, Any]) -> dict[str, str]:
    given: dict[str, str] = compose["server"]["environment"]
    return {**IMAGE_ENVIRONMENT, **given, "VBLORA_MODEL": "demo"}


def test_the_settings_of_the_image_and_of_compose_are_settings(
    compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = container_environment(compose)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = load_settings({})
    names = {name for name in environment if name.startswith(ENV_PREFIX)} - NOT_SETTINGS
    assert settings.model_fields_set >= {name.removeprefix(ENV_PREFIX).lower() for name in names}
    assert (settings.host, settings.port, settings.model) == ("0.0.0.0", 8000, "demo")


def test_the_image_has_no_model_and_is_not_open_by_itself() -> None:
    assert "VBLORA_MODEL" not in IMAGE_ENVIRONMENT
    assert "VBLORA_ALLOW_UNAUTHENTICATED" not in IMAGE_ENVIRONMENT


def test_the_image_is_not_roots_and_writes_to_its_volumes_only() -> None:
    assert IMAGE.last("USER") == "10001:10001"
    volumes = json.loads(IMAGE.last("VOLUME"))
    assert {IMAGE_ENVIRONMENT["VBLORA_DATA_DIR"], IMAGE_ENVIRONMENT["VBLORA_CACHE_DIR"]} == set(volumes)
    assert Path(IMAGE_ENVIRONMENT["HF_HOME"]).parent == Path(IMAGE_ENVIRONMENT["VBLORA_CACHE_DIR"])
    assert set(volumes) <= set(FOLDERS)


def test_compose_mounts_every_volume_of_the_image(compose: dict[str, Any]) -> None:
    mounted = dict(entry.split(":")[:2][::-1] for entry in compose["server"]["volumes"])
    assert set(mounted) == set(json.loads(IMAGE.last("VOLUME")))
    declared = read("deploy/compose.yaml")["volumes"]
    assert set(mounted.values()) <= set(declared)
    assert compose["server"]["read_only"] is True


def test_compose_publishes_on_loopback_only(compose: dict[str, Any]) -> None:
    for service in compose.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_a_stop_leaves_time_to_drain(compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in compose["server"]["environment"].items():
        monkeypatch.setenv(name, value)
    drain = load_settings({"model": "demo"}).drain_timeout
    assert float(compose["server"]["stop_grace_period"].rstrip("s")) >= drain + 2


def test_prometheus_scrapes_the_server_by_a_name_that_it_answers(compose: dict[str, Any]) -> None:
    (job,) = read("deploy/prometheus/prometheus.yml")["scrape_configs"]
    ((target,),) = (entry["targets"] for entry in job["static_configs"])
    host, _, port = target.partition(":")
    assert host in compose
    assert job.get("metrics_path", "/metrics") == "/metrics"
    assert port == IMAGE.last("EXPOSE") == container_environment(compose)["VBLORA_PORT"]
    assert host in compose["server"]["environment"]["VBLORA_ALLOWED_HOSTS"].split(",")
    assert "127.0.0.1" in compose["server"]["environment"]["VBLORA_ALLOWED_HOSTS"].split(",")  # the health check


def test_prometheus_reads_the_file_that_is_mounted(compose: dict[str, Any]) -> None:
    source, target, mode = compose["prometheus"]["volumes"][0].split(":")
    assert (ROOT / "deploy" / source).is_file()
    assert mode == "ro"
    assert f"--config.file={target}" in compose["prometheus"]["command"]


def test_the_image_copies_what_the_package_needs() -> None:
    copied = {
        word
        for step in read_stages(ROOT / "Dockerfile")[0].steps
        if step.instruction == "COPY"
        for word in shlex.split(step.value)[:-1]
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    build = {"constraints.txt", "pyproject.toml", "setup.py", "vblora", "serving"}
    assert copied == {*build, project["readme"], *project["license-files"]}
