"""`vblora-serve adapter …` against a real server, and what it says when that is not there."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from serving.cli import app
from tests.integration.api.conftest import Files, Server


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
