"""Fold deltas into base weights, and take them out again exactly. Knows adapted layers, not the model.

A merged layer computes with a new parameter, W + Σ B A summed in float32; its own parameter is kept and put back, so
that unmerging restores every bit, and a weight shared with another module stays as it is there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vblora.errors import MergeError
from vblora.inject import quantised_kind
from vblora.layer import AdaptedLinear


@torch.no_grad()
def merge(
    layers: Mapping[str, AdaptedLinear], names: Sequence[str], *, safe: bool = False, progress: bool = False
) -> None:
    """Make `names` the adapters that are merged, in every layer that one of them targets.

    Raises `MergeError`, before anything is changed, if a weight is quantised, or if `safe` and a merged one is not
    finite.
    """
    targeted = {path: layer for path, layer in layers.items() if layer.targeted_by(names)}
    for path, layer in targeted.items():
        if kind := quantised_kind(_own_weight(layer)):
            raise MergeError(f"the weight of {path} is quantised ({kind}): merge into the base model as it was before")
    for path, layer in targeted.items() if safe else ():
        if not merged_weight(layer, names).isfinite().all():
            raise MergeError(f"merging {', '.join(names)} would make the weight of {path} NaN or infinite")
    for count, layer in enumerate(targeted.values(), 1):
        _install(layer, names, merged_weight(layer, names))
        if progress:
            sys.stderr.write(f"\rmerged {count} of {len(targeted)} layers" + "\n" * (count == len(targeted)))


def merged_weight(layer: AdaptedLinear, names: Sequence[str]) -> Tensor:
    """The layer's own weight plus the named adapters' deltas, in its layout and dtype."""
    original = _own_weight(layer)
    pairs = [adapter.matrices() for adapter in layer.targeted_by(names)]
    a, b_transposed = (torch.cat([pair[side].float() for pair in pairs]) for side in (0, 1))
    left, right = (b_transposed.T, a) if isinstance(layer.base_layer, nn.Linear) else (a.T, b_transposed)
    return torch.addmm(original.float(), left, right).to(original.dtype)


def unmerge(layers: Mapping[str, AdaptedLinear]) -> None:
    """Put every layer's own weight back."""
    for layer in layers.values():
        layer.merged = []
        if layer.original_weight is not None:
            (original,) = layer.original_weight
            original.data = original.data.to(layer.base_layer.get_parameter("weight").device)
            layer.base_layer.register_parameter("weight", original)
            layer.original_weight = None


def _own_weight(layer: AdaptedLinear) -> nn.Parameter:
    return layer.original_weight[0] if layer.original_weight else layer.base_layer.get_parameter("weight")


def _install(layer: AdaptedLinear, names: Sequence[str], weight: Tensor) -> None:
    own = _own_weight(layer)
    layer.original_weight = (own,)
    layer.base_layer.register_parameter("weight", nn.Parameter(weight, requires_grad=own.requires_grad))
    layer.merged = list(names)
