"""The compiled CPU kernels of `csrc/kernels.cpp`, where they were built. Knows whether, not what for.

They are optional (see `setup.py`): whoever calls one asks `usable` first, and has the same in torch's operations.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16)
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


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels are there and take tensors like these: float32 or bfloat16, on the CPU."""
    return available and all(tensor.device.type == "cpu" and tensor.dtype in DTYPES for tensor in tensors)


def add_delta(y: Tensor, x: Tensor, table: Tensor, slots: Tensor, modules: Tensor, rank: int) -> None:
    """Add the deltas of some modules that share their input to `y` (n, Σ out), in place, for rows x (n, in).

    `slots` (n,) int32 names each row's row of `table`, 0 for none. `modules` (modules, 2) int64 says where each one's
    A (rank, in) begins in a row of the table, with B (rank, out) right behind it, and how many outputs it has. y and x
    have one dtype, the table the same or float32; the rank is a multiple of 4. Sums are float32.
    """
    torch.ops.vblora.add_delta_(y, x, table, slots, modules, rank)


def compose(target: Tensor, indices: Tensor, weights: Tensor, bank: Tensor) -> None:
    """Write sub-vectors one after another into `target` (n · b,): each the sum of k rows of `bank` (h, b), float32.

    `indices` (n, k) is one of `INDICES`; `weights` (n, k − 1) float32, the last weight being what they leave of one.
    """
    torch.ops.vblora.compose_(target, indices, weights, bank)


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
    result: Tensor = torch.ops.vblora.decode_attention(
        query, keys, values, tables, lengths, block_size, window or 0, scaling, softcap or 0.0, sinks
    )
    return result


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``x / sqrt(mean(x²) + epsilon) · weight`` over the last of up to four dimensions; `weight` is float32."""
    result: Tensor = torch.ops.vblora.rms_norm(x, weight, epsilon)
    return result
