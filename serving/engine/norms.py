"""RMS norms of the base model as one kernel each. Knows what a norm computes, not which model it is in.

transformers spells the same norm in many classes. Which of its two kinds a module is, it shows by its output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vblora import kernels

# x̂ is x / sqrt(mean(x²) + ε), w the module's weight.
KINDS: tuple[Callable[[Tensor], Tensor], ...] = (lambda w: w, lambda w: 1 + w)  # w · x̂ (Llama), (1 + w) · x̂ (Gemma)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of each number of the output, by its own size


class FusedNorm(nn.Module):
    """`original`, computed by the kernel where it takes the input."""

    def __init__(self, original: nn.Module, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.original = original
        self.epsilon = epsilon
        self.register_buffer("factors", weight, persistent=False)

    def forward(self, x: Tensor, *more: Any, **options: Any) -> Any:
        if more or options or not kernels.usable(x) or x.stride(-1) != 1:
            return self.original(x, *more, **options)
        return kernels.rms_norm(x, self.get_buffer("factors"), self.epsilon)


@torch.inference_mode()
def fuse_norms(model: nn.Module) -> int:
    """Put a `FusedNorm` in the place of every RMS norm that the kernel computes rightly; returns how many."""
    fused = 0
    for name, module in list(model.named_modules()):
        norm = _fused(module)
        if norm is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, norm)
            fused += 1
    return fused


def _fused(module: nn.Module) -> FusedNorm | None:
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, Tensor) or not isinstance(epsilon, float):
        return None
    if weight.dim() != 1 or not kernels.usable(weight):
        return None
    x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    expected = module(x)
    candidates = [FusedNorm(module, kind(weight.float()).contiguous(), epsilon) for kind in KINDS]
    errors = [_error(candidate(x), expected) for candidate in candidates]
    best = min(range(len(KINDS)), key=errors.__getitem__)  # weights may be so large that both are within the tolerance
    return candidates[best] if errors[best] <= TOLERANCE[x.dtype] else None


def _error(got: Tensor, expected: Tensor) -> float:
    """The largest relative difference; infinite for another dtype."""
    if got.dtype != expected.dtype:
        return float("inf")
    difference = (got.float() - expected.float()).abs()
    return float((difference / expected.float().abs().clamp_min(1e-6)).max())
