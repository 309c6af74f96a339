"""Linear layers laid out for speed give what they gave before, with each row's adapter added."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from serving.engine.linears import PackedLinear, Product, SiblingLinear, lay_out, own_product_pays, packable
from tests.support import random_adapter
from vblora import kernels
from vblora.batched import AdapterSlots, Segment, SlottedLinear
from vblora.compact import SlotLayout

WIDTH = 32
NAMES = ("q", "k", "v", "o")
GROUPS = [["q", "k", "v"], ["o"]]


class Layer(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(WIDTH, 64, bias), nn.Linear(WIDTH, 16, bias)
        self.v, self.o = nn.Linear(WIDTH, 16, bias), nn.Linear(64, WIDTH, bias)
        self.head = nn.Linear(WIDTH, 50, bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        gate = (k * v).sum(-1, keepdim=True).tanh()
        result: Tensor = self.head(self.o(q * gate) + x)
        return result


def slots_for(model: nn.Module) -> AdapterSlots:
    layout = SlotLayout.from_model(model, max_rank=8, adaptable=NAMES.__contains__)
    slots = AdapterSlots(layout, num_slots=3)
    for slot, rank in ((1, 2), (2, 8)):
        adapter = random_adapter(model, rank=rank, topk=2, targets=NAMES, seed=slot)
        slots.fill(slot, layout.compact(adapter))
    return slots


def rows(slots: AdapterSlots, dtype: torch.dtype) -> Tensor:
    slots.set_rows([Segment(1, 1), Segment(0, 1), Segment(2, 1), Segment(1, 4)])
    return torch.randn(1, 7, WIDTH, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.mark.usefixtures("either_kernels")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@torch.inference_mode()
def test_a_layer_laid_out_gives_what_slotted_linears_give(bias: bool, dtype: torch.dtype, tolerance: float) -> None:
    plain, fast = Layer(bias).to(dtype), Layer(bias).to(dtype)
    slots = slots_for(plain)
    for name in NAMES:
        setattr(plain, name, SlottedLinear(getattr(plain, name), name, slots))
    lay_out(fast, GROUPS, slots)
    assert all(isinstance(getattr(fast, name), SiblingLinear) for name in NAMES)
    assert isinstance(fast.head, PackedLinear) == packable(torch.zeros(1, dtype=dtype))
    x = rows(slots, dtype)
    expected, base = plain(x).float(), Layer(bias).to(dtype)(x).float()
    scale = float(expected.abs().max())
    assert float((expected - base).abs().max()) > 0.2 * scale, "the adapters hardly change anything: this shows nothing"
    assert torch.allclose(fast(x).float(), expected, atol=tolerance * scale, rtol=0)


@pytest.mark.usefixtures("either_kernels")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [48, 64, 200])
@pytest.mark.parametrize("rows", [*range(1, 9), 31, 32, 33, 47, 48])
@torch.inference_mode()
def test_a_product_of_any_number_of_rows(rows: int, outputs: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(1, rows, WIDTH, generator=generator).bfloat16()
    weight, added = (torch.randn(*size, generator=generator).bfloat16() for size in ((outputs, WIDTH), (outputs,)))
    product, expected = Product(weight, added if bias else None), x.float() @ weight.float().T + bias * added.float()
    got = product(x)
    assert got.shape == expected.shape and got.dtype == torch.bfloat16
    assert torch.allclose(got.float(), expected, atol=2e-2 * float(expected.abs().max()), rtol=0)
    if product.adds_deltas and kernels.available:
        parts = product.parts(x, (16, outputs - 16), None)
        assert [part.shape[-1] for part in parts] == [16, outputs - 16] and torch.equal(torch.cat(parts, -1), got)


@torch.inference_mode()
def test_few_rows_are_multiplied_alike_by_our_product_and_by_onednn() -> None:
    """Ours wherever it pays: a layout of oneDNN's that it does not know would show here, not in a slower server."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(640, 1024, generator=generator).bfloat16()
    product = Product(weight, None)
    assert product.own == (packable(weight) and kernels.available and own_product_pays())
    if not product.own:
        pytest.skip("needs AVX-512's bfloat16 and no AMX: elsewhere all products are oneDNN's")
    for rows in (1, 4, 7, 32):
        x = torch.randn(1, rows, 1024, generator=generator).bfloat16()
        ours = product(x)
        product.own = False
        theirs = product(x)
        product.own = True
        assert torch.allclose(ours.float(), theirs.float(), atol=2**-7 * float(theirs.abs().max()), rtol=0)


@torch.inference_mode()
def test_a_layout_that_is_not_known_is_left_to_onednn() -> None:
    weight = torch.randn(64, 64).bfloat16()
    if not packable(weight):
        pytest.skip("needs a processor for which oneDNN packs bfloat16")
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
    other = torch.ops.mkldnn._reorder_linear_weight(torch.randn(64, 40).bfloat16(), 32)  # 40 inputs are filled up to 64
    assert not kernels.reads_packed(packed, weight.flip(0)), "the blocks were not looked at"
    assert not kernels.reads_packed(packed, weight.T.contiguous()), "the places of inputs were not looked at"
    assert not kernels.reads_packed(packed, weight.float())
    assert not kernels.reads_packed(other, torch.zeros(64, 40).bfloat16())


@torch.inference_mode()
def test_siblings_may_be_asked_in_any_order_and_for_other_inputs_in_between() -> None:
    plain, fast = Layer(), Layer()
    slots = slots_for(plain)
    lay_out(fast, GROUPS, slots)
    slots.set_rows([Segment(0, 2)])
    one, two = torch.randn(1, 2, WIDTH), torch.randn(1, 2, WIDTH)
    for name, x in (("v", one), ("q", one), ("q", two), ("k", one), ("k", one), ("v", two), ("q", two), ("k", two)):
        assert torch.allclose(getattr(fast, name)(x), getattr(plain, name)(x), atol=1e-6), name


@torch.inference_mode()
def test_an_input_that_was_changed_after_all_had_it_is_computed_anew() -> None:
    plain, fast = Layer(), Layer()
    slots = slots_for(plain)
    lay_out(fast, GROUPS, slots)
    slots.set_rows([Segment(0, 2)])
    x = torch.randn(1, 2, WIDTH)
    for _ in range(2):
        for name in GROUPS[0]:
            assert torch.allclose(getattr(fast, name)(x), getattr(plain, name)(x), atol=1e-6)
        x.mul_(2)


@torch.inference_mode()
def test_layers_that_differ_or_are_no_plain_linears_stay_on_their_own() -> None:
    class Other(nn.Linear):
        pass

    model = Layer()
    model.k, model.v = nn.Linear(WIDTH, 16, bias=False), Other(WIDTH, 16)
    slots = slots_for(model)
    lay_out(model, [["q", "k"], ["v"], ["o"]], slots)
    assert all(isinstance(getattr(model, name), SlottedLinear) for name in ("q", "k", "v"))
    assert isinstance(model.o, SiblingLinear)
