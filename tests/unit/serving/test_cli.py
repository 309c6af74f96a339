from __future__ import annotations

import pytest
from typer.testing import CliRunner

from serving.cli import app
from serving.settings import ServerSettings, flag_of
from serving.settings_reference import settings_reference


def test_run_has_a_flag_for_every_setting() -> None:
    output = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "300"}).stdout
    for name in ServerSettings.model_fields:
        assert ("MODEL" if name == "model" else flag_of(name)) in output
    assert "--config" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--port", "x"], "--port"),
        ([], "model is required"),
        (["demo", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["demo", "--adapter", "a"], "NAME=PATH"),
    ],
)
def test_wrong_settings_end_with_one_line_and_status_2(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["run", *arguments])
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_unknown_flags_are_refused() -> None:
    assert CliRunner().invoke(app, ["run", "demo", "--made-up"]).exit_code == 2


def test_the_reference_is_printed() -> None:
    assert CliRunner().invoke(app, ["settings"]).stdout == settings_reference()
