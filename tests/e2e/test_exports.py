"""A shipped adapter taken elsewhere by the installed commands: as a LoRA in PEFT, and merged into the real model."""

from __future__ import annotations

import subprocess
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from serving.demo import ADAPTERS
from tests.e2e.conftest import ROOT, tool_environment
from vblora import VBLoRAModel
from vblora.integrations.base_models import BaseModel

ADAPTER = ADAPTERS / "tallywire"
TEXT = "The boiler has been leaking since seven this morning."


def run(*command: object) -> None:
    result = subprocess.run(list(map(str, command)), cwd=ROOT, env=tool_environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    found: Tensor = model.eval()(input_ids=ids).logits
    return found


@pytest.fixture(scope="module")
def ids(demo_base: BaseModel) -> Tensor:
    return torch.tensor([demo_base.tokenizer.encode(TEXT)])


@pytest.fixture(scope="module")
def wanted(demo_base: BaseModel, ids: Tensor) -> Tensor:
    """The logits of the adapter here."""
    alone = logits(demo_base.model, ids)
    adapted = VBLoRAModel.from_pretrained(demo_base.model, ADAPTER)
    found = logits(adapted, ids)
    adapted.unload()
    assert (found - alone).abs().max() > 1
    return found


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT asks transformers for its old name
def test_the_lora_gives_the_same_logits_in_peft(
    demo_base: BaseModel, ids: Tensor, wanted: Tensor, tmp_path: Path
) -> None:
    run("vblora", "export-lora", ADAPTER, "--out", tmp_path / "lora")
    adapted = peft.PeftModel.from_pretrained(demo_base.model, tmp_path / "lora")
    found = logits(adapted, ids)
    adapted.unload()
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_the_merged_model_needs_no_adapter(ids: Tensor, wanted: Tensor, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    run("vblora", "merge", "--model", "demo", "--adapter", ADAPTER, "--out", out, "--dtype", "float32")
    merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert merged.dtype == torch.float32
    found = logits(merged, ids)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    assert AutoTokenizer.from_pretrained(out).encode(TEXT) == ids[0].tolist()
