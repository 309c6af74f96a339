"""What holds for one forward, or one training step: rows with adapters of their own, matrices composed all at once.

Knows adapted layers, not the model around them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from vblora.errors import ConfigError
from vblora.layer import AdaptedLinear, LayerAdapter
from vblora.mixture import TopK, compose_all, matrix_a, matrix_b


@contextmanager
def each_row(layers: Collection[AdaptedLinear], names: Sequence[str]) -> Iterator[None]:
    """Within this context row i of a batch uses adapter `names[i]`, and no other."""
    for layer in layers:
        layer.rows = list(names)
    try:
        yield
    finally:
        for layer in layers:
            layer.rows = None


def check_rows(names: Sequence[str], inputs: Iterable[object]) -> None:
    """Raise `ConfigError` unless there is a name for each row of the first tensor among a forward's inputs."""
    batch = next((len(value) for value in inputs if isinstance(value, Tensor) and value.dim()), len(names))
    if batch != len(names):
        raise ConfigError(f"adapter_names has {len(names)} names, but the batch has {batch} rows")


@contextmanager
def composed(adapters: Sequence[LayerAdapter]) -> Iterator[None]:
    """Compose the A and B of many layers in one operation a bank, once for all that happens within this context.

    Gradients flow through it: a backward belongs inside, and so does no more than one of them.
    """
    by_bank: dict[object, list[tuple[LayerAdapter, tuple[TopK, TopK]]]] = defaultdict(list)
    for adapter in adapters:
        mixtures = adapter.mixtures()
        a, _ = mixtures
        by_bank[adapter.bank, a.indices.shape[-1], a.weights.device].append((adapter, mixtures))
    for members in by_bank.values():
        bank = members[0][0].bank.vectors.to(members[0][1][0].weights.device)
        parts = compose_all([side for _, sides in members for side in sides], bank)
        for (adapter, _), sub_a, sub_b in zip(members, parts[::2], parts[1::2], strict=True):
            adapter.given = matrix_a(sub_a), matrix_b(sub_b)
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.given = None
