"""Merging and unmerging: the same answers, the same bits back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.support import VOCAB_SIZE, tiny_model
from vblora import AdapterNameError, MergeError, VBLoRAConfig, VBLoRAModel, get_vblora_model

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    ids = torch.randint(VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(1))
    logits: Tensor = model(input_ids=ids).logits
    return logits


def adapted(family: str = "llama") -> VBLoRAModel:
    torch.manual_seed(0)
    config = VBLoRAConfig(num_vectors=12, vector_length=16, target_modules="all-linear", init_vector_bank_bound=0.5)
    model = get_vblora_model(tiny_model(family), config)
    model.add_adapter("b", config)
    model.set_adapter(["default", "b"])
    return model.eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_answers_are_the_same_and_unmerging_is_exact(family: str) -> None:
    model = adapted(family)
    alone, wanted, before = answer(tiny_model(family)), answer(model), weights(model)
    model.merge_adapter(["default"])
    torch.testing.assert_close(answer(model), wanted, atol=1e-3, rtol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(answer(model), wanted, atol=1e-3, rtol=1e-4)
    with model.disable_adapter():
        assert torch.equal(answer(model), alone)
    torch.testing.assert_close(answer(model), wanted, atol=1e-3, rtol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items() if name in before)
    assert torch.equal(answer(model), wanted)


def test_bfloat16_weights_come_back_bit_for_bit() -> None:
    model = adapted()
    model.model.bfloat16()
    before = weights(model)
    model.merge_adapter()
    assert any(not torch.equal(value, before[name]) for name, value in weights(model).items())
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_merge_and_unload_leaves_a_plain_model(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    wanted = answer(model)
    base = model.merge_and_unload(progressbar=True, safe_merge=True)
    assert {type(module).__name__ for module in base.modules()} == {
        type(module).__name__ for module in tiny_model().modules()
    }
    assert base.state_dict().keys() == tiny_model().state_dict().keys()
    torch.testing.assert_close(answer(base), wanted, atol=1e-3, rtol=1e-4)
    assert "merged 14 of 14 layers\n" in capsys.readouterr().err


def test_merging_chosen_adapters_only() -> None:
    model = adapted()
    model.set_adapter("b")
    wanted = answer(model)
    model.set_adapter("default")
    torch.testing.assert_close(answer(model.merge_and_unload(adapter_names=["b"])), wanted, atol=1e-3, rtol=1e-4)


def test_a_safe_merge_changes_nothing_when_it_fails() -> None:
    model = adapted()
    with torch.no_grad():
        model.bank("b").vectors[0] = torch.inf
    before = weights(model)
    with pytest.raises(MergeError, match="NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    model.merge_adapter(["default"], safe_merge=True)


def test_names_are_checked() -> None:
    model = adapted()
    with pytest.raises(AdapterNameError, match="a list"):
        model.merge_and_unload(adapter_names="default")
    with pytest.raises(AdapterNameError, match="nobody"):
        model.merge_adapter(["nobody"])


def test_switching_unmerges_first() -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="unmerging"):
        model.set_adapter("b")
    with pytest.warns(UserWarning, match="nothing is merged"):
        model.unmerge_adapter()


def test_tied_weights_are_not_changed_elsewhere() -> None:
    torch.manual_seed(0)
    base = tiny_model(tie_word_embeddings=True)
    model = get_vblora_model(base, VBLoRAConfig(num_vectors=9, vector_length=4, target_modules=["lm_head"]))
    embedding = base.get_input_embeddings().weight.detach().clone()
    wanted = answer(model)
    model.merge_adapter()
    torch.testing.assert_close(answer(model), wanted, atol=1e-3, rtol=1e-4)
    assert torch.equal(base.get_input_embeddings().weight, embedding)
