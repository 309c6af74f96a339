"""The commands, run as a user runs them, in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.support import save_random_adapter, save_tiny_model, tiny_model
from vblora import VBLoRAConfig, VBLoRAModel, read_adapter
from vblora.checkpoint import bank_hash, content_hash
from vblora.cli import app, main
from vblora.cli.flags import CONFIG_HELP, TRAINING_HELP
from vblora.integrations.base_models import load_base_model
from vblora.loop import TrainingOptions

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


def test_every_hyperparameter_and_option_has_a_flag() -> None:
    assert CONFIG_HELP.keys() == VBLoRAConfig().canonical().keys() - {"peft_type"}
    assert TRAINING_HELP.keys() == TrainingOptions.__dataclass_fields__.keys()
    for command in ("train", "train-bank"):
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
        for name in (*CONFIG_HELP, *TRAINING_HELP):
            assert f"--{name.replace('_', '-')} " in shown


def test_train_bank_then_a_new_customer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path
) -> None:
    model, out = save_tiny_model(tmp_path / "model"), tmp_path / "bank"
    second = tmp_path / "bob.train.jsonl"
    second.write_text(data.read_text())
    small = ["--model", model, "--max-steps", 4, "--vector-length", 16, "--num-vectors", 32, "--eval-fraction", 0.4]
    assert run(monkeypatch, "train-bank", "--data", data, "--data", second, "--out", out, *small) == 0
    shown = capsys.readouterr().out
    assert "4 over 4 rows of 2 customers" in shown
    assert "rows: held-out loss, 1 rows" in shown and "bob: held-out loss, 1 rows" in shown
    assert {path.name for path in out.iterdir()} == {
        "bank.safetensors", "rows", "bob", "training.json", "losses.csv", "losses.png",
    }  # fmt: skip
    frozen = ["--bank", out / "bank.safetensors", "--freeze-bank"]
    assert run(monkeypatch, "train", "--data", data, "--out", tmp_path / "new", *small, *frozen) == 0
    assert bank_hash(read_adapter(tmp_path / "new").bank) == bank_hash(read_adapter(out / "bob").bank)
    on = ["--start", out / "bob", "--freeze-bank"]
    assert run(monkeypatch, "train", "--data", second, "--out", tmp_path / "on", *small, *on) == 0
    assert bank_hash(read_adapter(tmp_path / "on").bank) == bank_hash(read_adapter(out / "bob").bank)
    capsys.readouterr()
    assert run(monkeypatch, "train-bank", "--data", data, "--data", data, "--out", out, *small) == 1
    assert "a second file of customer 'rows'" in capsys.readouterr().err


def test_merge_writes_a_model_that_answers_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, out = save_tiny_model(tmp_path / "model"), tmp_path / "merged"
    adapter = save_random_adapter(tmp_path / "adapter", tiny_model())
    arguments = ["merge", "--model", model, "--adapter", adapter, "--out", out, "--dtype", "float32"]
    assert run(monkeypatch, *arguments) == 0
    assert "merged 4 of 4 layers" in capsys.readouterr().err
    ids = torch.tensor([[5, 6, 7, 8]])
    merged = load_base_model(str(out)).model
    with torch.no_grad():
        wanted = VBLoRAModel.from_pretrained(tiny_model(), adapter)(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(tiny_model()(input_ids=ids).logits, wanted, atol=1e-2)
    before = {file: file.read_bytes() for file in out.iterdir()}
    assert run(monkeypatch, *arguments) == 1
    assert "is not empty" in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in out.iterdir()}


def test_export_lora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    adapter = save_random_adapter(tmp_path / "adapter", tiny_model())
    assert run(monkeypatch, "export-lora", adapter, "--out", tmp_path / "lora") == 0
    assert "bytes, from" in capsys.readouterr().out
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert run(monkeypatch, "export-lora", tmp_path, "--out", tmp_path / "other") == 1
    assert "adapter_config.json is missing" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_params_proposes_the_lengths_that_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    assert run(monkeypatch, "params", model, "--target-modules", "all-linear", "--num-vectors", 100) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [[cell for cell in line if cell not in "│┃"] for line in lines if len(line) > 5]
    # N = Σ r (in + out) / b = 4 · 2 layers · 1,024 / 16; stored: h b + N (k - 1 + k / 4) float32
    assert ["16", "512", "52,800", "211,200", "bytes", "9,472", "bytes"] in rows
    assert [row[0] for row in rows[1:] if row[0].isdecimal()] == ["8", "16", "32"]
    assert any(row[:2] == ["LoRA", "8,192"] for row in rows)
    assert run(monkeypatch, "params", model, "--task-type", "SEQ_CLS", "--target-modules", "all-linear") == 0
    assert "14 modules" in capsys.readouterr().out
    assert run(monkeypatch, "params", model, "--task-type", "POETRY") == 1
    assert "task_type must be one of CAUSAL_LM" in capsys.readouterr().err
