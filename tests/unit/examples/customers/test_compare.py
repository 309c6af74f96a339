"""The comparison of LoRA, own banks and a shared bank, on a tiny model: every way is measured as it says."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
from safetensors.torch import load_file

from examples.customers.compare import DATA, TARGETS, main
from tests.support import save_tiny_model
from vblora import VBLoRAConfig, VectorBank
from vblora.data import read_rows
from vblora.integrations.base_models import load_base_model
from vblora.loop import TrainingOptions
from vblora.loss import evaluate_loss
from vblora.training import train

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT asks for its old name
CUSTOMER = "tallywire"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and the adapters of one customer on it: lora, own and shared."""
    folder = tmp_path_factory.mktemp("runs")
    model = str(save_tiny_model(folder / "model"))
    main(["lora", CUSTOMER, "--model", model, "--out", str(folder / "lora" / CUSTOMER), "--seed", "0", "--steps", "3"])
    config = VBLoRAConfig(num_vectors=64, vector_length=16, target_modules=TARGETS, save_only_topk_weights=True)
    rows = read_rows(DATA / f"{CUSTOMER}.train.jsonl")[:24]
    for way, bank in (("own", None), ("shared", VectorBank.random(64, 16, 0.5))):
        options = TrainingOptions(max_steps=2, eval_fraction=0)
        base = load_base_model(model)
        train(base, config, rows, folder / way / CUSTOMER, options, bank=bank, freeze_bank=bank is not None)
    return folder


def test_the_lora_is_pefts_and_was_trained(runs: Path) -> None:
    tensors = load_file(runs / "lora" / CUSTOMER / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * len(TARGETS)
    assert all(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    config = peft.PeftConfig.from_pretrained(runs / "lora" / CUSTOMER)
    assert (config.peft_type, config.r) == ("LORA", 4)


def test_the_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [f"--{way}={runs / way}" for way in ("own", "shared", "lora")]
    main(["table", "--model", str(runs / "model"), "--rows", "5", *folders])
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])[CUSTOMER]
    base = load_base_model(str(runs / "model"))
    rows = read_rows(DATA / f"{CUSTOMER}.heldout.jsonl")[:5]
    peft.PeftModel.from_pretrained(base.model, runs / "lora" / CUSTOMER)
    assert found["LoRA"]["loss"] == pytest.approx(evaluate_loss(base.model, base.tokenizer, rows))
    assert len({way["loss"] for way in found.values()}) == 3
    sub_vectors = 4 * 2 * (64 + 64 + 64 + 32 + 64 + 32 + 64 + 64 + 2 * (64 + 128) + 128 + 64) // 16
    assert found["own bank"]["trained"] == sub_vectors * 64 + 64 * 16
    assert found["shared bank"]["trained"] == sub_vectors * 64
    assert found["LoRA"]["trained"] == sub_vectors * 16
    sizes = {way: (runs / way / CUSTOMER / "adapter_model.safetensors").stat().st_size for way in ("own", "shared")}
    assert found["own bank"]["bytes"] == sizes["own"]
    assert found["shared bank"]["bytes"] == sizes["shared"] - 4 * 64 * 16
    change = found["shared bank"]["loss"] / found["own bank"]["loss"] - 1
    assert f"{change:+.1%} |" in next(line for line in lines if line.startswith(f"| {CUSTOMER} |"))
    assert f"| {sub_vectors * 16:,} | {sub_vectors * 64 + 1024:,} | {sub_vectors * 64:,} |" in "\n".join(lines)
