"""The compiled CPU kernels of `csrc/kernels.cpp`, where they were built. Knows whether, not what for.

They are optional (see `setup.py`): whoever calls one asks `usable` first, and has the same in torch's operations.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16)
RANKS = 4  # a rank must be a multiple of it
INDICES = (torch.uint8, torch.int16, torch.int32)


def _load() -> bool:
    try:
        import vblora._kernels  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except ModuleNotFoundError:
        return False
    except ImportError as error:  # built for another torch
        log.warning("the compiled kernels cannot be loaded, install vblora again: %s", error)
        return False
    return True


available = _load()
if available:  # looked up once: each call through `torch.ops` costs microseconds, hundreds of times a step
    _add_delta = torch.ops.vblora.add_delta_.default
    _decode_attention = torch.ops.vblora.decode_attention.default
    _linear = torch.ops.vblora.linear.default
    _linear_with_delta = torch.ops.vblora.linear_with_delta.default
    _store = torch.ops.vblora.store_.default
    _quantize_rows = torch.ops.vblora.quantize_rows.default
    _scale_rows = torch.ops.vblora.scale_rows_.default
    _rotate = torch.ops.vblora.rotate.default
    _argmax = torch.ops.vblora.argmax.default
    _forbid = torch.ops.vblora.forbid_.default
    _rms_norm = torch.ops.vblora.rms_norm.default


class Delta(NamedTuple):
    """What `add_delta` adds: see there."""

    table: Tensor
    slots: Tensor
    modules: Tensor
    rank: int


NO_DELTA = (None, None, None, 0)


def usable(tensor: Tensor) -> bool:
    """Whether the kernels are there and take tensors like this: float32 or bfloat16, on the CPU."""
    return available and tensor.is_cpu and tensor.dtype in DTYPES


def add_delta(y: Tensor, x: Tensor, delta: Delta) -> None:
    """Add the deltas of some modules that share their input to `y` (..., Σ out), in place, for n rows x (..., in).

    `slots` (n,) int32 names each row's row of `table`, 0 for none. `modules` (modules, 2) int64 says where each one's
    A (rank, in) begins in a row of the table, with B (rank, out) right behind it, and how many outputs it has. y and x
    have one dtype, the table the same or float32; the rank is a multiple of `RANKS`. Sums are float32.
    """
    _add_delta(y, x, *delta)


def linear_with_delta(x: Tensor, weight: Tensor, bias: Tensor | None, delta: Delta) -> Tensor:
    """x (n, in) → x Wᵀ + bias + its delta (n, out), without gradients."""
    result: Tensor = _linear_with_delta(x, weight, bias, *delta)
    return result


def reads_packed(packed: Tensor, weight: Tensor) -> bool:
    """Whether `linear` may take the compiled product of few rows: built for this processor, which multiplies bfloat16,
    and knowing the layout that oneDNN chose for `packed`, which is `weight` (out, in) packed."""
    return available and bool(torch.ops.vblora.reads_packed(packed, weight))


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    *,
    own: bool,
    few: int,
    step: int,
    delta: Delta | None,
) -> list[Tensor]:
    """x (..., rows, in) → x Wᵀ + bias + its delta, split into parts (..., rows, size), on weights packed for oneDNN.

    Up to `few` rows are multiplied by the compiled product if `own`, which is only for weights that `reads_packed`
    allows; all else by oneDNN's, more than `few` rows filled up to a multiple of `step`. Dtypes are as in `add_delta`.
    """
    result: list[Tensor] = _linear(x, packed, bias, sizes, own, few, step, *(delta or NO_DELTA))
    return result


def compose(target: Tensor, indices: Tensor, weights: Tensor, bank: Tensor) -> None:
    """Write sub-vectors one after another into `target` (n · b,): each the sum of k rows of `bank` (h, b), float32.

    `indices` (n, k) is one of `INDICES`; `weights` (n, k − 1) float32, the last weight being what they leave of one.
    """
    torch.ops.vblora.compose_(target, indices, weights, bank)


def store(cache: Tensor, fresh: Tensor, targets: Tensor) -> None:
    """Write new keys or values (heads, tokens, size) to the positions `targets` (tokens,) int64 of a paged cache
    (positions, heads, size) of the same dtype."""
    _store(cache, fresh, targets)


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *,
    block_size: int,
    window: int | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of one query a row, (n, heads, size), over `lengths` (n,) positions of a paged cache.

    keys and values are (positions, key heads, size), `tables` (n, blocks) the blocks of each row, both int32 as
    `lengths`. Returns (n, heads, size of a value). The rest is as in `AttentionOptions`.
    """
    result: Tensor = _decode_attention(
        query, keys, values, tables, lengths, block_size, window or 0, scaling, softcap or 0.0, sinks
    )
    return result


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., width) as int8 of the same shape and a float32 scale a row (..., 1), so that x ≈ int8 · scale."""
    result: tuple[Tensor, Tensor] = _quantize_rows(x)
    return result


def scale_rows(y: Tensor, scales: Tensor) -> None:
    """Multiply each row of y (..., width) by its scale (..., 1) float32, in place."""
    _scale_rows(y, scales)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of x (1, heads, tokens, size): ``x · cos + (−second half, first half) · sin``, cos and sin being
    (1, tokens, size) of the same dtype."""
    result: Tensor = _rotate(x, cos, sin)
    return result


def argmax(x: Tensor) -> Tensor:
    """The index of the highest number of each row of x (n, width), the lowest of equal ones: (n,) int64. Where a row
    holds what is not a number, the index of the first of these, as `torch.argmax` gives one of them."""
    result: Tensor = _argmax(x)
    return result


def forbid(x: Tensor, bits: Tensor) -> None:
    """Set the numbers of x (size,) whose bits are not set to minus infinity, in place. `bits` (words,) int32 has 32 of
    them a word, the lowest first; numbers beyond its end have none set."""
    _forbid(x, bits)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``x / sqrt(mean(x²) + epsilon) · weight`` over the last of up to four dimensions; `weight` is float32."""
    result: Tensor = _rms_norm(x, weight, epsilon)
    return result
