"""The fast path of a batch in which every row has its own adapter: slot tables and per-row deltas.

Knows slots and rows, not names, tenants or requests. Slot 0 is zeros: "no adapter". The slow reference is `layer.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vblora.compact import CompactAdapter, SlotLayout

NO_ADAPTER = 0


class Segment(NamedTuple):
    """`length` consecutive rows of the flat batch that share one slot."""

    slot: int
    length: int


@dataclass(frozen=True)
class _Gathered:
    """Rows with a slot each: `rows` and `slots` are (n,)."""

    bucket: int
    rows: Tensor
    slots: Tensor


@dataclass(frozen=True)
class _Span:
    """Consecutive rows of one slot: two plain matrix products instead of a gather a row."""

    bucket: int
    rows: slice
    slot: int


class AdapterSlots:
    """Tables of composed A and B, a row a slot, one table for each rank bucket of the layout.

    A table is (slots, R · width); `views[R][m]` are its strided views for module m: A (slots, R, in) and Bᵀ
    (slots, R, out). Tables start as zeros; on the CPU the system commits their pages when a slot is first filled.
    """

    def __init__(
        self,
        layout: SlotLayout,
        num_slots: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_slots < 2:
            raise ValueError(f"num_slots is {num_slots}, but slot 0 is kept for rows without adapter: use 2 or more")
        self.layout = layout
        self.num_slots = num_slots
        self.tables = {
            bucket: torch.zeros(num_slots, bucket * layout.width, dtype=dtype, device=device)
            for bucket in layout.buckets
        }
        self._views = {bucket: self._module_views(bucket) for bucket in layout.buckets}
        self._bucket_of: dict[int, int] = {}
        self._parts: list[_Gathered | _Span] = []
        self._num_rows = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tables when every slot is filled."""
        return sum(table.nbytes for table in self.tables.values())

    def _module_views(self, bucket: int) -> dict[str, tuple[Tensor, Tensor]]:
        table = self.tables[bucket]
        views = {}
        for name, shape, start in self.layout.starts(bucket):
            middle, end = start + bucket * shape.in_features, start + bucket * (shape.in_features + shape.out_features)
            a = table[:, start:middle].view(self.num_slots, bucket, shape.in_features)
            views[name] = a, table[:, middle:end].view(self.num_slots, bucket, shape.out_features)
        return views

    @torch.no_grad()
    def fill(self, slot: int, adapter: CompactAdapter) -> None:
        """Compose `adapter` into `slot`. Raises ValueError for slot 0, which stays zeros."""
        if not NO_ADAPTER < slot < self.num_slots:
            raise ValueError(f"slot {slot} cannot be filled: slots 1 to {self.num_slots - 1} hold adapters")
        self.clear(slot)
        composed = adapter.compose()
        row = self.tables[adapter.bucket][slot]
        for target, source, length in adapter.runs:
            row[target : target + length].copy_(composed[source : source + length])
        self._bucket_of[slot] = adapter.bucket

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Zero what `slot` holds."""
        bucket = self._bucket_of.pop(slot, None)
        if bucket is not None:
            self.tables[bucket][slot].zero_()

    def set_rows(self, segments: Sequence[Segment]) -> None:
        """Say which slot each row of the next forward uses; the rows lie in the order of `segments`."""
        device = next(iter(self.tables.values())).device
        single: dict[int, list[tuple[int, int]]] = defaultdict(list)
        parts: list[_Gathered | _Span] = []
        start = 0
        for slot, length in segments:
            bucket = self._bucket_of.get(slot)
            if bucket is not None and length == 1:
                single[bucket].append((start, slot))
            elif bucket is not None:
                parts.append(_Span(bucket, slice(start, start + length), slot))
            start += length
        for bucket, pairs in single.items():
            rows, slots = torch.tensor(pairs, device=device).unbind(1)
            parts.append(_Gathered(bucket, rows, slots))
        self._parts, self._num_rows = parts, start

    def add_delta(self, module: str, x: Tensor, y: Tensor) -> Tensor:
        """Add each row's `x Aᵀ Bᵀ` to `y` in place; x is (..., in) and y (..., out) with as many rows as were set.

        Raises ValueError when the module sees other rows than the batch's (a layer that drops or repeats tokens).
        """
        if not self._parts:
            return y
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if flat_x.shape[0] != self._num_rows:
            raise ValueError(f"{module} was called with {flat_x.shape[0]} rows in a batch of {self._num_rows}")
        for part in self._parts:
            a, b = self._views[part.bucket][module]
            rows = flat_x[part.rows].to(a.dtype)
            if isinstance(part, _Span):
                flat_y[part.rows] += (rows @ a[part.slot].T @ b[part.slot]).to(y.dtype)
            else:
                low = torch.bmm(a[part.slots], rows.unsqueeze(-1)).transpose(1, 2)
                delta = torch.bmm(low, b[part.slots]).squeeze(1)
                flat_y.index_add_(0, part.rows, delta.to(y.dtype))
        return y


class SlottedLinear(nn.Module):
    """A linear layer of the base model that adds each row's delta from its slot."""

    def __init__(self, base_layer: nn.Module, name: str, slots: AdapterSlots) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.slots = slots

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        return self.slots.add_delta(self.name, x, y)


def attach_slots(model: nn.Module, slots: AdapterSlots) -> None:
    """Replace every module of the slots' layout in `model` by its `SlottedLinear`."""
    for name in slots.layout.modules:
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], SlottedLinear(model.get_submodule(name), name, slots))
