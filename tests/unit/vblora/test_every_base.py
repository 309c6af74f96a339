"""All that the method does, on every kind of base model, in float32 and in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.bases import BASES, hyperparameters, loss, make_base, outputs
from vblora import AdapterNameError, VBLoRAConfig, VBLoRAModel, get_vblora_model, param_groups

DTYPES = (torch.float32, torch.bfloat16)
# Of the difference's norm over the output's: sums in another order, and weights rounded after a merge.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2e-2}
pytestmark = [
    pytest.mark.parametrize("base", BASES),
    pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")),
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def config(base: str, **changes: Any) -> VBLoRAConfig:
    return VBLoRAConfig(**hyperparameters(base, **changes))


@torch.no_grad()
def answer(base: str, model: nn.Module, dtype: torch.dtype) -> Tensor:
    return outputs(base, model, dtype)


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert (found.float() - wanted.float()).norm() <= ROUNDING[dtype] * wanted.float().norm()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_step_of_training_lowers_the_loss(base: str, dtype: torch.dtype) -> None:
    model = get_vblora_model(make_base(base, dtype), config(base))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(param_groups(model, 0.1, 0.01, 0.01))
    before = loss(base, model, dtype)
    before.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    assert any("classifier" in name for name in trained) == (base == "roberta")
    optimizer.step()
    assert loss(base, model, dtype).item() < before.item()
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) and parameters[name].grad is None for name, value in frozen.items())


@pytest.mark.parametrize("topk_only", [False, True], ids=["full", "topk"])
def test_saved_and_loaded_it_answers_the_same(base: str, dtype: torch.dtype, topk_only: bool, tmp_path: Path) -> None:
    model = get_vblora_model(make_base(base, dtype), config(base, topk=3, save_only_topk_weights=topk_only))
    optimizer = torch.optim.SGD(param_groups(model, 0.1, 0.01, 0.01))
    loss(base, model, dtype).backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    loaded = VBLoRAModel.from_pretrained(make_base(base, dtype), tmp_path)
    found, wanted = answer(base, loaded, dtype), answer(base, model, dtype)
    assert not torch.equal(wanted, answer(base, make_base(base, dtype), dtype))
    if topk_only:
        assert_close(found, wanted, dtype)
    else:
        assert torch.equal(found, wanted)


def test_merging_unmerging_and_unloading(base: str, dtype: torch.dtype) -> None:
    model = get_vblora_model(make_base(base, dtype), config(base)).eval()
    before, wanted, alone = bits(model), answer(base, model, dtype), answer(base, make_base(base, dtype), dtype)
    assert not torch.equal(wanted, alone)
    model.merge_adapter(safe_merge=True)
    assert_close(answer(base, model, dtype), wanted, dtype)
    with pytest.raises(AdapterNameError, match="merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    assert_same_bits(model, before)
    assert torch.equal(answer(base, model, dtype), wanted)
    assert torch.equal(answer(base, model.unload(), dtype), alone)


def test_unloading_gives_the_base_models_own_modules_back(base: str, dtype: torch.dtype) -> None:
    model = make_base(base, dtype)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    adapted = get_vblora_model(model, config(base, bias="all"))
    adapted.merge_adapter()
    assert adapted.unload() is model
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_merged_for_good(base: str, dtype: torch.dtype) -> None:
    model = get_vblora_model(make_base(base, dtype), config(base)).eval()
    wanted, names = answer(base, model, dtype), set(make_base(base).state_dict())
    merged = model.merge_and_unload(safe_merge=True)
    assert_close(answer(base, merged, dtype), wanted, dtype)
    assert set(merged.state_dict()) == names


def test_several_adapters_of_different_shapes(base: str, dtype: torch.dtype) -> None:
    own_head = {"task_type": None}  # of adapters with heads of their own, only one can be active
    model = get_vblora_model(make_base(base, dtype), config(base)).eval()
    first = answer(base, model, dtype)
    model.add_adapter("team.b", config(base, r=2, num_vectors=9, vector_length=8, topk=3, **own_head))
    assert torch.equal(answer(base, model, dtype), first)
    model.set_adapter("team.b")
    second = answer(base, model, dtype)
    model.set_adapter(["default", "team.b"])
    both = answer(base, model, dtype)
    alone = answer(base, make_base(base, dtype), dtype)
    assert not any(torch.equal(x, y) for x, y in [(first, second), (first, both), (second, both), (first, alone)])
    with model.disable_adapter():
        assert torch.equal(answer(base, model, dtype), alone)
    model.delete_adapter("default")
    assert model.active_adapters == ["team.b"]
    assert torch.equal(answer(base, model, dtype), second)
    model.delete_adapter("team.b")
    assert torch.equal(answer(base, model, dtype), alone)


def test_rows_with_adapters_of_their_own(base: str, dtype: torch.dtype) -> None:
    model = get_vblora_model(make_base(base, dtype), config(base, task_type=None)).eval()
    model.add_adapter("b", config(base, task_type=None, r=1))
    names = ["b", "__base__", "default", "b"]
    wanted = {"__base__": answer(base, make_base(base, dtype), dtype)}
    for name in ("default", "b"):
        model.set_adapter(name)
        wanted[name] = answer(base, model, dtype)
    mixed = answer(base, lambda **values: model(adapter_names=names, **values), dtype)  # type: ignore[arg-type]
    for row, name in enumerate(names):
        assert_close(mixed[row], wanted[name][row], dtype)
    assert torch.equal(answer(base, model, dtype), wanted["b"])
