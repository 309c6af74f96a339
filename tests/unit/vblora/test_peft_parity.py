"""PEFT as the oracle: the same state gives the same answers and the same training, and files go both ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.bases import BASES, hyperparameters, loss, make_base, outputs
from vblora import VBLoRAConfig, VBLoRAModel, export_lora, get_vblora_model, read_adapter
from vblora.checkpoint import content_hash

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),  # PEFT asks transformers for its old name
    pytest.mark.parametrize("base", BASES),
]
MODES = [(k, topk_only) for k in (1, 2, 3) for topk_only in (False, True)]
# PEFT 0.21 restores NaN where rounding makes the last of three or more saved weights negative.
READABLE_BY_PEFT = [(k, topk_only) for k, topk_only in MODES if k <= 2 or not topk_only]
STEPS = 20


@torch.no_grad()
def answer(base: str, model: nn.Module) -> Tensor:
    return outputs(base, model)


def assert_same(found: Tensor, wanted: Tensor, alone: Tensor) -> None:
    scale = wanted.abs().max().item()
    assert (wanted - alone).abs().max().item() > 1e-2 * scale, "the adapter does nothing: the test would show nothing"
    assert (found - wanted).abs().max().item() <= 1e-6 * scale


def theirs(base: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = peft.get_peft_model(make_base(base), peft.VBLoRAConfig(**hyperparameters(base, **changes)))
    return model.eval()


def save(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)  # type: ignore[operator]


@pytest.mark.parametrize(("k", "topk_only"), MODES)
def test_an_adapter_of_peft_answers_the_same_here(base: str, k: int, topk_only: bool, tmp_path: Path) -> None:
    oracle = theirs(base, topk=k, save_only_topk_weights=topk_only)
    save(oracle, tmp_path)
    ours = VBLoRAModel.from_pretrained(make_base(base), tmp_path)
    assert_same(answer(base, ours), answer(base, oracle), answer(base, make_base(base)))
    ours.save_pretrained(tmp_path / "again")
    mine, original = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "again", tmp_path))
    assert mine.keys() == original.keys()
    assert all(mine[name].dtype == original[name].dtype for name in original)
    assert all(torch.equal(mine[name], original[name]) for name in original)
    assert content_hash(read_adapter(tmp_path)) == content_hash(read_adapter(tmp_path / "again"))


@pytest.mark.parametrize(("k", "topk_only"), READABLE_BY_PEFT)
def test_an_adapter_written_here_answers_the_same_in_peft(base: str, k: int, topk_only: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = VBLoRAConfig(**hyperparameters(base, topk=k, save_only_topk_weights=topk_only))
    ours = get_vblora_model(make_base(base), config).eval()
    ours.save_pretrained(tmp_path)
    oracle = peft.PeftModel.from_pretrained(make_base(base), tmp_path)
    assert_same(answer(base, oracle), answer(base, ours), answer(base, make_base(base)))


def train(base: str, model: nn.Module) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        value = loss(base, model)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("bias", ["none", "all", "vblora_only"])
def test_it_trains_as_peft_does(base: str, bias: str, tmp_path: Path) -> None:
    oracle = theirs(base, bias=bias)
    save(oracle, tmp_path / "start")
    ours = VBLoRAModel.from_pretrained(make_base(base), tmp_path / "start", is_trainable=True)
    count = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, oracle)]
    assert count[0] == count[1]
    found, wanted = train(base, ours.eval()), train(base, oracle)
    assert wanted[-1] < wanted[0] - 0.01
    assert found == pytest.approx(wanted, abs=1e-4)
    # What was trained besides the deltas is in the file too, under the same names.
    save(oracle, tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    # PEFT writes the biases of modules_to_save a second and a third time, under the names of its wrapper.
    wrappers = {name for name in files[1] if ".original_module." in name or ".modules_to_save." in name}
    assert files[0].keys() == files[1].keys() - wrappers
    again = VBLoRAModel.from_pretrained(make_base(base), tmp_path / "theirs")
    assert_same(answer(base, again), answer(base, oracle), answer(base, make_base(base)))


@pytest.mark.parametrize("layers", [[0], 1])
def test_layers_to_transform_choose_the_same_modules(base: str, layers: list[int] | int) -> None:
    if base == "linears":
        values = hyperparameters(base, target_modules=["linear"], layers_pattern=["blocks"])
    else:
        values = hyperparameters(base)
    values["layers_to_transform"] = layers
    oracle = peft.get_peft_model(copy.deepcopy(make_base(base)), peft.VBLoRAConfig(**values))
    ours = get_vblora_model(make_base(base), VBLoRAConfig(**values))
    assert set(ours.adapted_layers) == set(oracle.targeted_module_names)


def test_all_linear_chooses_the_same_modules(base: str) -> None:
    values = hyperparameters(base, target_modules="all-linear", vector_length=8)
    oracle = peft.get_peft_model(make_base(base), peft.VBLoRAConfig(**values))
    ours = get_vblora_model(make_base(base), VBLoRAConfig(**values))
    assert set(ours.adapted_layers) == set(oracle.targeted_module_names)


@pytest.mark.parametrize("bias", ["none", "vblora_only"])
@pytest.mark.parametrize("topk_only", [False, True])
def test_an_exported_lora_answers_the_same_in_peft(base: str, bias: str, topk_only: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = hyperparameters(base, topk=3, bias=bias)
    ours = get_vblora_model(make_base(base), VBLoRAConfig(**values)).eval()
    train(base, ours)
    ours.peft_config["default"].save_only_topk_weights = topk_only
    ours.save_pretrained(tmp_path / "vblora")
    ours = VBLoRAModel.from_pretrained(make_base(base), tmp_path / "vblora")
    export_lora(tmp_path / "vblora", tmp_path / "lora")
    oracle = peft.PeftModel.from_pretrained(make_base(base), tmp_path / "lora")
    assert oracle.peft_config["default"].peft_type == "LORA"
    assert_same(answer(base, oracle), answer(base, ours), answer(base, make_base(base)))
