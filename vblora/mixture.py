"""The equations of VB-LoRA: logits → top-k metadata → sub-vectors → A and B. Pure functions that know no modules.

Source: Li et al., "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", arXiv 2405.15179. With bank
rows `α_i` and logits `σ` of one sub-vector, the sub-vector is `Σ_{i in top k} softmax(σ_top)_i · α_i`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class ModuleShape(NamedTuple):
    """One adaptable linear: `y = x Wᵀ` maps `in_features` to `out_features`."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class TopK:
    """The mixture of each sub-vector: `indices` (…, k) of an integer dtype, `weights` (…, k) that sum to one."""

    indices: Tensor
    weights: Tensor


def topk_mixture(logits: Tensor, k: int) -> TopK:
    """The k largest of `logits` (…, h) and the softmax over those k only; weights are differentiable, descending."""
    values, indices = logits.topk(k, dim=-1)
    return TopK(indices, torch.softmax(values, dim=-1))


def compose(mixture: TopK, bank: Tensor) -> Tensor:
    """The sub-vectors (…, b) of a mixture over a `bank` (h, b); differentiable in weights and bank."""
    indices, weights = mixture.indices, mixture.weights
    k = indices.shape[-1]
    flat = F.embedding_bag(
        indices.reshape(-1, k).long(), bank, per_sample_weights=weights.reshape(-1, k).to(bank.dtype), mode="sum"
    )
    return flat.reshape(*indices.shape[:-1], bank.shape[1])


def compose_all(mixtures: Sequence[TopK], bank: Tensor) -> list[Tensor]:
    """What `compose` gives for each mixture, in one operation: k must be the same in all."""
    k = mixtures[0].indices.shape[-1]
    joined = TopK(
        torch.cat([mixture.indices.reshape(-1, k).long() for mixture in mixtures]),
        torch.cat([mixture.weights.reshape(-1, k) for mixture in mixtures]),
    )
    sizes = [mixture.indices[..., 0].numel() for mixture in mixtures]
    parts = compose(joined, bank).split(sizes)
    return [part.view(*mixture.indices.shape[:-1], -1) for part, mixture in zip(parts, mixtures, strict=True)]


def matrix_a(sub_a: Tensor) -> Tensor:
    """A (r, in) from its sub-vectors (r, in/b, b): `A[q, j·b:(j+1)·b] = sub_a[q, j]`."""
    return sub_a.flatten(1)


def matrix_b(sub_b: Tensor) -> Tensor:
    """Bᵀ (r, out) from B's sub-vectors (out/b, r, b): `B[j·b:(j+1)·b, q] = sub_b[j, q]`.

    Transposed, because the products of a tall thin B and of its gradient are several times slower on a CPU.
    """
    return sub_b.transpose(0, 1).flatten(1)


def index_dtype(num_vectors: int) -> torch.dtype:
    """The smallest integer dtype that holds every index below `num_vectors`."""
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if num_vectors - 1 <= torch.iinfo(dtype).max:
            return dtype
    return torch.int64
