"""The commands, run as a user runs them, in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support import save_random_adapter, save_tiny_model, tiny_model
from vblora import VBLoRAConfig, read_adapter
from vblora.checkpoint import content_hash
from vblora.cli import app, main, train

ROWS = [{"prompt": f"name: {name}", "completion": f" {name} serves food."} for name in ("Aroma", "Cotto", "Eagle")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["vblora", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        main()
    return exit_info.value.code


def test_train_then_inspect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path
) -> None:
    model = save_tiny_model(tmp_path / "model")
    out = tmp_path / "out"
    code = run(
        monkeypatch, "train", "--model", model, "--data", data, "--out", out, "--max-steps", 3, "--eval-data", data,
        "--vector-length", 16, "--num-vectors", 32, "--r", 2, "--topk", 3, "--target-modules", "q_proj,down_proj",
    )  # fmt: skip
    assert code == 0
    captured = capsys.readouterr().out
    assert "3 over 3 rows" in captured
    assert "nats a token" in captured
    checkpoint = read_adapter(out)
    assert (checkpoint.config.r, checkpoint.config.topk) == (2, 3)
    assert checkpoint.config.target_modules == ["down_proj", "q_proj"]
    assert checkpoint.config.base_model_name_or_path == "model"
    assert run(monkeypatch, "inspect", out) == 0
    shown = capsys.readouterr().out
    assert content_hash(checkpoint) in shown
    assert "can be trained on        yes" in shown
    assert "model.layers.0.mlp.down_proj" in shown


def test_inspect_says_when_an_adapter_cannot_be_trained(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(save_random_adapter(tmp_path / "a", tiny_model()))])
    assert "no: top-k metadata only" in result.stdout


def test_errors_are_one_line_and_status_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path
) -> None:
    model = save_tiny_model(tmp_path / "model")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(ROWS[0]) + '\n{"prompt": "a"}\n')
    for source, flags, message in (
        (tmp_path / "none.jsonl", [], "no such file"),
        (bad, [], "bad.jsonl:2: expected the fields prompt and completion"),
        (data, ["--vector-length", 48], "divide all 4 targets: 1, 2, 4, 8, 16, 32"),
        (data, ["--topk", 0], "topk must be a positive integer"),
        (data, ["--bias", "some"], "bias must be one of none, all, vblora_only, not 'some'"),
        (data, ["--modules-to-save", "haed", "--vector-length", 16], "no module named 'haed'"),
        (data, ["--layers-to-transform", "x"], "layers_to_transform must be layer indices"),
        (data, ["--bank", tmp_path / "bank.safetensors"], "bank.safetensors is missing"),
    ):
        assert run(monkeypatch, "train", "--model", model, "--data", source, "--out", tmp_path / "out", *flags) == 1
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    assert run(monkeypatch, "inspect", tmp_path) == 1
    assert "adapter_config.json is missing" in capsys.readouterr().err


def test_every_hyperparameter_has_a_flag() -> None:
    assert train.__annotations__.keys() >= VBLoRAConfig().canonical().keys() - {"peft_type"}
