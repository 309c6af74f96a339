"""The fast path of a batch in which every row has its own adapter: slot tables and per-row deltas.

Knows slots and rows, not names, tenants or requests. Slot 0 is zeros: "no adapter". The slow reference is `layer.py`;
where the compiled kernel does not run, torch's operations do the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vblora import kernels
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
        self._table = next(iter(self.tables.values()))
        self._compiled = _row_dtypes(self._table)
        self._views = {bucket: self._module_views(bucket) for bucket in layout.buckets}
        self._known_places: dict[tuple[str, ...], dict[int, Tensor]] = {}
        self._bucket_of: dict[int, int] = {}
        self._segments: list[Segment] = []  # of the step, and what is made of them when it is first asked for:
        self._parts: list[_Gathered | _Span] | None = None
        self._row_slots: dict[int, Tensor] | None = None
        self._num_rows, self._adapted = 0, False

    @property
    def nbytes(self) -> int:
        """Bytes in use when every slot holds an adapter of the highest rank."""
        return self.num_slots * self.layout.slot_bytes(self._table.dtype)

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
        row = self.tables[adapter.bucket][slot]
        if self._bucket_of.get(slot) != adapter.bucket or sum(run.length for run in adapter.runs) < len(row):
            self.clear(slot)
        self._bucket_of[slot] = adapter.bucket  # before it is written to: whatever fails, `clear` knows what to zero
        if kernels.usable(row) and adapter.indices.dtype in kernels.INDICES:
            size = adapter.bank.shape[1]
            for target, source, length in adapter.runs:
                part = slice(source // size, (source + length) // size)
                kernels.compose(
                    row[target : target + length], adapter.indices[part], adapter.weights[part], adapter.bank
                )
            return
        composed = adapter.compose()
        for target, source, length in adapter.runs:
            row[target : target + length].copy_(composed[source : source + length])

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Zero what `slot` holds."""
        bucket = self._bucket_of.pop(slot, None)
        if bucket is not None:
            self.tables[bucket][slot].zero_()

    def set_rows(self, segments: Sequence[Segment]) -> None:
        """Say which slot each row of the next forward uses; the rows lie in the order of `segments`."""
        self._segments = list(segments)
        self._num_rows = sum(segment.length for segment in segments)
        self._adapted = any(segment.slot in self._bucket_of for segment in segments)
        self._parts = self._row_slots = None

    def _by_bucket(self) -> dict[int, Tensor]:
        """For each bucket in the step the slot of every row (rows,), 0 for those that are not of it."""
        lengths = torch.tensor([segment.length for segment in self._segments])
        buckets = [self._bucket_of.get(segment.slot, 0) for segment in self._segments]
        result = {}
        for bucket in set(buckets) - {0}:
            slots = [s.slot if of == bucket else NO_ADAPTER for s, of in zip(self._segments, buckets, strict=True)]
            result[bucket] = torch.tensor(slots, dtype=torch.int32).repeat_interleave(lengths)
        return result

    def _split(self) -> list[_Gathered | _Span]:
        """The rows that have an adapter, as torch's operations take them."""
        device = self._table.device
        single: dict[int, list[tuple[int, int]]] = defaultdict(list)
        parts: list[_Gathered | _Span] = []
        start = 0
        for slot, length in self._segments:
            bucket = self._bucket_of.get(slot)
            if bucket is not None and length == 1:
                single[bucket].append((start, slot))
            elif bucket is not None:
                parts.append(_Span(bucket, slice(start, start + length), slot))
            start += length
        for bucket, pairs in single.items():
            rows, slots = torch.tensor(pairs, device=device).unbind(1)
            parts.append(_Gathered(bucket, rows, slots))
        return parts

    def add_delta(self, modules: tuple[str, ...], x: Tensor, y: Tensor) -> Tensor:
        """Add each row's `x Aᵀ Bᵀ` to `y` in place, for modules that take the same input: x is (..., in), and y
        (..., Σ out) holds their outputs side by side; both have as many rows as were set.

        Raises ValueError when the modules see other rows than the batch's (a layer that drops or repeats tokens).
        """
        if not self._adapted:
            return y
        if self.compiled_for(x):
            for delta in self.deltas(modules, x):
                kernels.add_delta(y, x, delta)
        else:
            self._check_rows(modules, x)
            self._add_by_parts(modules, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return y

    def compiled_for(self, x: Tensor) -> bool:
        """Whether the kernel adds deltas to rows such as x."""
        return kernels.available and x.dtype in self._compiled

    def deltas(self, modules: tuple[str, ...], x: Tensor) -> list[kernels.Delta]:
        """What `add_delta` adds for x, as the kernel takes it: one for each rank bucket in the batch."""
        if not self._adapted:
            return []
        self._check_rows(modules, x)
        if self._row_slots is None:
            self._row_slots = self._by_bucket()
        places = self._places(modules)
        return [kernels.Delta(self.tables[bucket], slots, places[bucket], bucket)
                for bucket, slots in self._row_slots.items()]  # fmt: skip

    def _check_rows(self, modules: tuple[str, ...], x: Tensor) -> None:
        if x.numel() != self._num_rows * x.shape[-1]:
            rows = x.numel() // x.shape[-1]
            raise ValueError(f"{modules[0]} was called with {rows} rows in a batch of {self._num_rows}")

    def _add_by_parts(self, modules: tuple[str, ...], x: Tensor, y: Tensor) -> None:
        """The same in torch's operations: x is (rows, in), y (rows, Σ out)."""
        self._parts = self._split() if self._parts is None else self._parts
        sizes = [self.layout.modules[module].out_features for module in modules]
        for module, columns in zip(modules, y.split(sizes, dim=1), strict=True):
            for part in self._parts:
                self._add_part(part, *self._views[part.bucket][module], x, columns)

    def _places(self, modules: tuple[str, ...]) -> dict[int, Tensor]:
        """For each bucket where the modules begin in a slot, and their numbers of outputs: (modules, 2)."""
        if modules not in self._known_places:
            self._known_places[modules] = {
                bucket: torch.tensor([[starts[name], self.layout.modules[name].out_features] for name in modules])
                for bucket in self.layout.buckets
                for starts in [{name: start for name, _, start in self.layout.starts(bucket)}]
            }
        return self._known_places[modules]

    def _add_part(self, part: _Gathered | _Span, a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> None:
        rows = x[part.rows].to(a.dtype)
        if isinstance(part, _Span):
            y[part.rows] += (rows @ a[part.slot].T @ b[part.slot]).to(y.dtype)
        else:
            low = torch.bmm(a[part.slots], rows.unsqueeze(-1)).transpose(1, 2)
            delta = torch.bmm(low, b[part.slots]).squeeze(1)
            y.index_add_(0, part.rows, delta.to(y.dtype))


def _row_dtypes(table: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes of rows that the kernel adds deltas to from this table: the table's own or, from float32, any."""
    if not (table.is_cpu and table.dtype in kernels.DTYPES):
        return ()
    return kernels.DTYPES if table.dtype == torch.float32 else (table.dtype,)


class SlottedLinear(nn.Module):
    """A linear layer of the base model that adds each row's delta from its slot."""

    def __init__(self, base_layer: nn.Module, name: str, slots: AdapterSlots) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.slots = slots

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        return self.slots.add_delta((self.name,), x, y)


def attach_slots(model: nn.Module, slots: AdapterSlots) -> None:
    """Replace every module of the slots' layout in `model` by its `SlottedLinear`."""
    for name in slots.layout.modules:
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], SlottedLinear(model.get_submodule(name), name, slots))
