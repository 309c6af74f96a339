"""`vblora-serve adapter …` against a real server, and what it says when that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serving.cli import app
from tests.integration.api.conftest import Files, Server
from tests.integration.api.keyed import Keyed, keyed


@pytest.fixture(scope="module")
def guarded(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    with keyed(files, tmp_path_factory.mktemp("keyed")) as started:
        yield started


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["adapter", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_an_adapter_is_pushed_listed_activated_and_deleted(server: Server, files: Files) -> None:
    url = ("--url", server.url)
    revisions = []
    for number in (2, 3):
        status, output, _ = invoke("push", "mine", str(files.adapter(number)), *url)
        revisions.append(server.client.get("/v1/adapters/mine").json()["active_revision"])
        assert status == 0
        assert output.startswith(f"mine@{revisions[-1]}  ")
    status, output, _ = invoke("list", *url)
    assert status == 0
    assert [line.split()[0].partition("@")[0] for line in output.splitlines()] == ["a0", "a1", "mine"]
    assert "2 revisions" in output.splitlines()[2]
    assert "shared" in output.splitlines()[0]
    assert invoke("activate", "mine", revisions[0], *url) == (0, f"mine@{revisions[0]}\n", "")
    assert invoke("delete", "mine", *url) == (0, "", "")
    assert invoke("delete", "mine", *url) == (1, "", "vblora-serve: The model 'mine' does not exist.\n")


def test_a_name_is_not_a_path(server: Server) -> None:
    for name in ("mine/revisions/0", "../models", "a?b"):
        status, _, error = invoke("delete", name, "--url", server.url)
        assert (status, error.count("\n")) == (1, 1)


def test_failures_are_one_line(tmp_path: Path) -> None:
    status, _, error = invoke("push", "mine", str(tmp_path))
    assert (status, error.count("\n")) == (1, 1)
    assert "adapter_config.json" in error
    status, _, error = invoke("list", "--url", "http://127.0.0.1:1")
    assert (status, error.count("\n")) == (1, 1)
    assert "http://127.0.0.1:1" in error
    status, _, error = invoke("list", "--url", "nonsense")
    assert (status, error.count("\n")) == (1, 1)


def test_the_key_is_taken_from_the_environment(guarded: Keyed, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    url = ("--url", guarded.server.url)
    monkeypatch.delenv("VBLORA_API_KEY", raising=False)
    assert invoke("list", *url) == (1, "", "vblora-serve: The API key is missing, wrong or disabled.\n")
    monkeypatch.setenv("VBLORA_API_KEY", "schlüssel ✗")
    assert invoke("list", *url)[0] == 1
    monkeypatch.setenv("VBLORA_API_KEY", guarded.keys["acme"])
    assert invoke("push", "mine", str(files.adapter(2)), *url)[0] == 0
    assert invoke("list", *url)[1].startswith("mine@")
    monkeypatch.setenv("VBLORA_API_KEY", guarded.keys["ops"])
    assert invoke("list", *url) == (0, "", "")
    assert invoke("delete", "mine", *url) == (1, "", "vblora-serve: The model 'mine' does not exist.\n")


def test_a_list_of_several_pages_is_whole(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.adapter_cli.PAGE", 1)
    status, output, _ = invoke("list", "--url", server.url)
    assert [line.partition("@")[0] for line in output.splitlines()] == ["a0", "a1"]
    assert status == 0


def test_what_an_adapter_lacks_is_told_in_the_servers_words(server: Server, files: Files, tmp_path: Path) -> None:
    config = (files.adapter(0) / "adapter_config.json").read_bytes()
    (tmp_path / "adapter_config.json").write_bytes(config)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"short")
    status, output, error = invoke("push", "mine", str(tmp_path), "--url", server.url)
    assert (status, output, error.count("\n")) == (1, "", 1)
    assert "empty or truncated" in error and str(tmp_path) not in error
    status, _, error = invoke("activate", "a0", "0" * 16, "--url", server.url)
    assert (status, error) == (1, f"vblora-serve: The model 'a0@{'0' * 16}' does not exist.\n")


def test_an_answer_that_is_no_success_is_a_failure(server: Server) -> None:
    status, output, error = invoke("list", "--url", f"{server.url}/nowhere")
    assert (status, output, error.count("\n")) == (1, "", 1)
