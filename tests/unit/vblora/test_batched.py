"""Per-row deltas from slots against the plain products of composed A and B, row by row."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from tests.support import random_adapter
from vblora import kernels
from vblora.batched import AdapterSlots, Segment, SlottedLinear, attach_slots
from vblora.checkpoint import AdapterCheckpoint, TopKModule
from vblora.compact import SlotLayout
from vblora.errors import IncompatibleError
from vblora.mixture import ModuleShape, compose, matrix_a, matrix_b

INPUTS, MIDDLE, OUTPUTS = 32, 64, 32
POPULARITY = {
    "distinct": [1, 2, 3, 4, 5],
    "identical": [2, 2, 2, 2, 2],
    "skewed": [1, 1, 1, 1, 3],
    "with base rows": [0, 1, 0, 5, 0],
    "none": [0, 0, 0, 0, 0],
}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(INPUTS, MIDDLE)
        self.down = nn.Linear(MIDDLE, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.up(x))
        return result


def adapters(model: nn.Module) -> list[AdapterCheckpoint]:
    both = ("up", "down")
    return [
        random_adapter(model, rank=2, topk=1, targets=both, seed=1),
        random_adapter(model, rank=4, topk=2, vector_length=16, targets=both, seed=2),
        random_adapter(model, rank=8, topk=3, targets=both, seed=3),
        random_adapter(model, rank=3, topk=2, targets=("up",), seed=4),
        random_adapter(model, rank=4, topk=2, num_vectors=300, targets=("down",), seed=5),
    ]


def reference_delta(adapter: AdapterCheckpoint, name: str, x: Tensor) -> Tensor:
    module = adapter.modules.get(name)
    if module is None:
        return x.new_zeros(x.shape[0], {"up": MIDDLE, "down": OUTPUTS}[name])
    assert isinstance(module, TopKModule)
    a = matrix_a(compose(module.a, adapter.bank))
    b = matrix_b(compose(module.b, adapter.bank)).T
    return x @ a.T @ b.T


def filled(model: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[AdapterSlots, list[AdapterCheckpoint]]:
    layout = SlotLayout.from_model(model, max_rank=8)
    slots = AdapterSlots(layout, num_slots=6, dtype=dtype)
    checkpoints = adapters(model)
    for slot, checkpoint in enumerate(checkpoints, start=1):
        slots.fill(slot, layout.compact(checkpoint))
    return slots, checkpoints


@pytest.mark.usefixtures("either_kernels")
@pytest.mark.parametrize("chunk", [1, 6])
@pytest.mark.parametrize("rows", POPULARITY.values(), ids=POPULARITY)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_each_row_gets_the_delta_of_its_own_slot(
    rows: list[int], chunk: int, dtype: torch.dtype, tolerance: float
) -> None:
    model = Base()
    slots, checkpoints = filled(model, dtype)
    segments = [Segment(slot, 1) for slot in rows] + [Segment(slot, chunk) for slot in rows]
    slots.set_rows(segments)
    total = sum(segment.length for segment in segments)
    for name, module in (("up", model.up), ("down", model.down)):
        x = torch.randn(1, total, module.in_features, generator=torch.Generator().manual_seed(9))
        got = slots.add_delta((name,), x, torch.zeros(1, total, module.out_features))[0]
        start = 0
        for slot, length in segments:
            part = x[0, start : start + length]
            expected = reference_delta(checkpoints[slot - 1], name, part) if slot else torch.zeros_like(got[:length])
            scale = max(1.0, float(expected.abs().max()))
            assert torch.allclose(got[start : start + length], expected, atol=tolerance * scale, rtol=0), (name, slot)
            start += length


@pytest.mark.usefixtures("either_kernels")
def test_a_slot_filled_again_holds_nothing_of_the_one_before() -> None:
    model = Base()
    layout = SlotLayout.from_model(model, max_rank=8)
    slots = AdapterSlots(layout, num_slots=2)
    for checkpoint in adapters(model):
        slots.fill(1, layout.compact(checkpoint))
    fresh = AdapterSlots(layout, num_slots=2)
    fresh.fill(1, layout.compact(adapters(model)[-1]))
    assert all(torch.equal(slots.tables[bucket], fresh.tables[bucket]) for bucket in layout.buckets)


def test_what_a_failed_filling_has_written_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Base()
    layout = SlotLayout.from_model(model, max_rank=8)
    slots = AdapterSlots(layout, num_slots=2)
    whole, small = adapters(model)[1], adapters(model)[3]
    compose = kernels.compose

    def fail(*arguments: Tensor) -> None:
        compose(*arguments)
        raise RuntimeError("torn off")

    monkeypatch.setattr(kernels, "compose", fail)
    with pytest.raises(RuntimeError, match="torn off"):
        slots.fill(1, layout.compact(whole))
    monkeypatch.setattr(kernels, "compose", compose)
    slots.fill(1, layout.compact(small))
    fresh = AdapterSlots(layout, num_slots=2)
    fresh.fill(1, layout.compact(small))
    assert all(torch.equal(slots.tables[bucket], fresh.tables[bucket]) for bucket in layout.buckets)


def test_a_cleared_slot_and_slot_zero_are_zeros() -> None:
    slots, _ = filled(Base())
    for slot in range(1, 6):
        slots.clear(slot)
    assert all(not table.any() for table in slots.tables.values())


def test_slot_zero_cannot_be_filled() -> None:
    model = Base()
    slots, checkpoints = filled(model)
    for slot in (0, 6, -1):
        with pytest.raises(ValueError, match="slots 1 to 5"):
            slots.fill(slot, slots.layout.compact(checkpoints[0]))


def test_composing_is_a_run_a_copy_for_an_adapter_that_fills_its_bucket() -> None:
    model = Base()
    compact = SlotLayout.from_model(model, max_rank=8).compact(random_adapter(model, rank=4, targets=("up", "down")))
    assert len(compact.runs) == 1
    assert compact.indices.dtype == torch.uint8


def test_metadata_costs_little() -> None:
    model = Base()
    compact = SlotLayout.from_model(model, max_rank=8).compact(
        random_adapter(model, rank=4, vector_length=16, targets=("up", "down"))
    )
    sub_vectors = 4 * (INPUTS + MIDDLE + MIDDLE + OUTPUTS) // 16
    assert compact.nbytes == sub_vectors * (2 * 1 + 1 * 4)


def test_attached_slots_add_to_the_base_and_rows_without_adapter_stay_bitwise_equal() -> None:
    model = Base()
    x = torch.randn(1, 3, INPUTS)
    expected = model(x)
    slots, _ = filled(model)
    attach_slots(model, slots)
    assert isinstance(model.up, SlottedLinear)
    slots.set_rows([Segment(0, 1), Segment(2, 1), Segment(0, 1)])
    got = model(x)
    assert torch.equal(got[0, [0, 2]], expected[0, [0, 2]])
    assert not torch.allclose(got[0, 1], expected[0, 1])


def test_rows_that_are_not_the_batch_s_are_refused() -> None:
    slots, _ = filled(Base())
    slots.set_rows([Segment(1, 1), Segment(2, 1)])
    with pytest.raises(ValueError, match="up was called with 3 rows in a batch of 2"):
        slots.add_delta(("up",), torch.randn(1, 3, INPUTS), torch.zeros(1, 3, MIDDLE))


def layout_with_output() -> SlotLayout:
    shapes = {"up": ModuleShape(INPUTS, MIDDLE), "down": ModuleShape(MIDDLE, OUTPUTS)}
    return SlotLayout(shapes, max_rank=4, output_layer="head")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"r": 8}, "r"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["up"]}, "modules_to_save"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_by_its_field(change: dict[str, object], field: str) -> None:
    checkpoint = random_adapter(Base(), targets=("up",))
    for name, value in change.items():
        setattr(checkpoint.config, name, value)
    with pytest.raises(IncompatibleError, match=field) as raised:
        layout_with_output().compact(checkpoint)
    assert raised.value.field == field


@pytest.mark.parametrize("name", ["head", "elsewhere"])
def test_modules_that_the_server_does_not_adapt_are_refused(name: str) -> None:
    checkpoint = random_adapter(Base(), targets=("up",))
    checkpoint = dataclasses.replace(checkpoint, modules={name: checkpoint.modules["up"]})
    with pytest.raises(IncompatibleError, match=name) as raised:
        layout_with_output().compact(checkpoint)
    assert raised.value.field == "target_modules"


def test_a_module_of_another_shape_is_refused() -> None:
    checkpoint = random_adapter(Base(), targets=("up",))
    checkpoint = dataclasses.replace(checkpoint, modules={"down": checkpoint.modules["up"]})
    with pytest.raises(IncompatibleError, match="maps 32 to 64 in the adapter, 64 to 32 in the base"):
        layout_with_output().compact(checkpoint)
