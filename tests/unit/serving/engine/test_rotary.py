"""Rotary positions as one kernel: whose function is replaced, by what, and whose is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

from serving.engine import rotary
from serving.engine.rotary import fuse_rotary
from tests.bases import tiny_model
from vblora import kernels


def attentions(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("self_attn")]


def hidden(model: nn.Module) -> Tensor:
    return model(torch.arange(9)[None], use_cache=False).logits  # type: ignore[no-any-return]


@torch.inference_mode()
def test_attention_of_this_model_alone_calls_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    expected, original = hidden(model), modeling_llama.apply_rotary_pos_emb
    assert fuse_rotary(attentions(model)) == len(attentions(model)) > 0
    assert modeling_llama.apply_rotary_pos_emb is original
    calls: list[Tensor] = []
    rotate = kernels.rotate
    monkeypatch.setattr(rotary.kernels, "rotate", lambda *given: calls.append(given[0]) or rotate(*given))
    assert torch.allclose(hidden(other), expected, atol=1e-5) and not calls
    assert torch.allclose(hidden(model), expected, atol=1e-5)
    assert len(calls) == 2 * len(attentions(model))


def test_other_kinds_are_left_alone() -> None:
    """Cohere turns neighbours against each other, not halves."""
    assert not rotary._usual(modeling_cohere.apply_rotary_pos_emb)
    assert fuse_rotary(attentions(tiny_model("cohere"))) == 0
    assert fuse_rotary([nn.Linear(2, 2)]) == 0


def test_nothing_is_replaced_where_the_kernels_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", False)
    assert fuse_rotary(attentions(tiny_model("llama"))) == 0
