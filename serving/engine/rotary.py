"""Rotary positions of the base model as one kernel a tensor. Knows attention modules, not which model they are in.

transformers' attention calls `apply_rotary_pos_emb` of its own file, of which there are several kinds. Where it is the
usual one, each attention of this model, and of no other, calls the kernel instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from vblora import kernels

NAME = "apply_rotary_pos_emb"
TOLERANCE = 1e-5  # in float32, of numbers around one
HEADS, TOKENS, SIZE = 3, 5, 8  # of what is tried

Rotary = Callable[..., tuple[Tensor, Tensor]]


def fused(original: Rotary) -> Rotary:
    """`original`, by the kernel where it takes the input."""

    def apply(
        query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *more: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        if more or options or not kernels.usable(query) or not query.dtype == key.dtype == cos.dtype:
            return original(query, key, cos, sin, *more, **options)
        if len(query) != 1 or cos.shape[-1] != query.shape[-1] or query.stride(-1) != 1 or key.stride(-1) != 1:
            return original(query, key, cos, sin)
        cos, sin = cos.contiguous(), sin.contiguous()
        return kernels.rotate(query, cos, sin), kernels.rotate(key, cos, sin)

    return apply


@torch.inference_mode()
def fuse_rotary(attentions: Iterable[nn.Module]) -> int:
    """Let these attention modules call the kernel where it computes the same as theirs; returns how many do."""
    count = 0
    usual: dict[Rotary, bool] = {}  # all layers of a model call the same one
    for attention in attentions:
        forward = type(attention).forward
        if not isinstance(forward, FunctionType) or NAME not in forward.__code__.co_names:
            continue
        original = forward.__globals__.get(NAME)
        if original is None:
            continue
        if original not in usual:
            usual[original] = _usual(original)
        if not usual[original]:
            continue
        own = {**forward.__globals__, NAME: fused(original)}
        copy = FunctionType(forward.__code__, own, forward.__name__, forward.__defaults__, forward.__closure__)
        copy.__kwdefaults__ = forward.__kwdefaults__
        attention.forward = MethodType(copy, attention)
        count += 1
    return count


def _usual(original: Rotary) -> bool:
    """Whether a function turns the two halves of a head against each other, as the kernel does."""
    if not kernels.available:
        return False
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, TOKENS, SIZE, generator=generator) for heads in (HEADS, 1))
    cos, sin = (torch.randn(1, TOKENS, SIZE, generator=generator) for _ in range(2))
    try:
        expected = original(query, key, cos, sin)
    except (TypeError, RuntimeError):  # it takes other arguments or shapes
        return False
    got = fused(original)(query, key, cos, sin)
    return all(
        one.shape == other.shape and torch.allclose(one, other, atol=TOLERANCE, rtol=0)
        for one, other in zip(expected, got, strict=True)
    )
