"""Norms as one kernel: which modules are replaced, by what, and which are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from serving.engine.norms import FusedNorm, fuse_norms
from vblora import kernels

SIZE = 24


class HalvedRMSNorm(LlamaRMSNorm):
    """Called like the others, and something else."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        result: Tensor = super().forward(hidden_states)
        return result / 2


def holding(norm: nn.Module, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Module()
    model.norm = norm
    nn.init.normal_(norm.get_parameter("weight"), std=scale, generator=torch.Generator().manual_seed(3))
    return model.to(dtype)


@pytest.mark.parametrize("scale", [0.5, 500.0], ids=["small weights", "large weights"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
def test_both_kinds_are_told_apart(
    kind: type[nn.Module], dtype: torch.dtype, tolerance: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = holding(kind(SIZE), scale, dtype)
    x = torch.randn(2, 5, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = model.norm(x)
    assert fuse_norms(model) == 1
    got = model.norm(x)
    assert isinstance(model.norm, FusedNorm) and not torch.equal(got, x)
    assert torch.allclose(got.float(), expected.float(), atol=0, rtol=2 * tolerance)
    monkeypatch.setattr(kernels, "available", False)
    assert torch.equal(model.norm(x), expected)


def test_what_computes_something_else_is_left_alone() -> None:
    for norm in (HalvedRMSNorm(SIZE), nn.LayerNorm(SIZE)):
        model = holding(norm)
        assert fuse_norms(model) == 0
        assert model.norm is norm


def test_nothing_is_replaced_where_the_kernels_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", False)
    assert fuse_norms(holding(LlamaRMSNorm(SIZE))) == 0
