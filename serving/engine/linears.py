"""The base model's linear layers laid out for speed: packed weights, and one product for those that share an input.

Knows layers, not what the model does with them. Only plain `nn.Linear`s are touched: others stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from serving.engine.quantization import Int8Product
from vblora import kernels
from vblora.batched import AdapterSlots, attach_slots

ROWS = 32  # of the input that a packed layout is made for; it takes any other number
ROWS_STEP = 16  # beyond that many rows, their number is filled up to a multiple of this


def packable(weight: Tensor) -> bool:
    """Whether oneDNN has a layout of its own for this weight: bfloat16 on a CPU that multiplies such."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def own_product_pays() -> bool:
    """Whether the compiled product of few rows is ahead of oneDNN's: with AVX-512's bfloat16, but without AMX, where
    it was not measured."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


class Product:
    """x (..., rows, in) → x Wᵀ + bias (..., rows, out), on packed weights where that is possible.

    Up to `ROWS` rows by the compiled product where that pays. oneDNN compiles code for every number of rows, and keeps
    it: prompts have hundreds of lengths, so some rows of zeros are added to have few.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._bias = bias
        self.adds_deltas = packed = packable(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS) if packed else weight
        self.own = packed and own_product_pays() and kernels.reads_packed(self._weight, weight)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.adds_deltas:
            return F.linear(x, self._weight, self._bias)
        if self.own:
            return self.parts(x, self._weight.shape[:1], None)[0]
        rows = x.shape[-2]
        extra = -rows % ROWS_STEP if rows > ROWS else 0
        filled = F.pad(x, (0, 0, 0, extra)) if extra else x
        y: Tensor = torch.ops.mkldnn._linear_pointwise(filled, self._weight, self._bias, "none", [], "")
        return y[..., :rows, :] if extra else y

    def parts(self, x: Tensor, sizes: Sequence[int], delta: kernels.Delta | None) -> list[Tensor]:
        """The same by the compiled kernels, with a delta and cut into parts: only of packed weights."""
        return kernels.linear(x, self._weight, self._bias, sizes, own=self.own, few=ROWS, step=ROWS_STEP, delta=delta)


MakeProduct = Callable[[Tensor, Tensor | None], Product | Int8Product]


class Siblings:
    """Linear layers that take the same input one after another: the first computes for all, adapters included.

    Holds the input, so that no other tensor can take its place, until each has its output.
    """

    def __init__(
        self, linears: Sequence[nn.Linear], names: Sequence[str], slots: AdapterSlots, product: MakeProduct
    ) -> None:
        self._sizes = [linear.out_features for linear in linears]
        self._names, self._slots = tuple(names), slots
        self._product = product(*_stacked(linears))
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []

    def output(self, index: int, x: Tensor) -> Tensor:
        """The output (..., out) of layer `index` for the input x (..., in)."""
        if len(self._sizes) == 1:
            return self._compute(x)[0]
        if x is not self._input or self._outputs[index] is None:
            self._input, self._outputs = x, list(self._compute(x))
        output = self._outputs[index]
        assert output is not None
        self._outputs[index] = None
        if not any(other is not None for other in self._outputs):
            self._input = None
        return output

    def _compute(self, x: Tensor) -> Sequence[Tensor]:
        if isinstance(self._product, Product) and self._product.adds_deltas and self._slots.compiled_for(x):
            deltas = self._slots.deltas(self._names, x)
            if len(deltas) <= 1:
                return self._product.parts(x, self._sizes, deltas[0] if deltas else None)
        y = self._slots.add_delta(self._names, x, self._product(x))
        parts: Sequence[Tensor] = y.split(self._sizes, dim=-1)
        return parts


class SiblingLinear(nn.Module):
    """One of the layers of `siblings`."""

    def __init__(self, siblings: Siblings, index: int) -> None:
        super().__init__()
        self._siblings, self._index = siblings, index

    def forward(self, x: Tensor) -> Tensor:
        return self._siblings.output(self._index, x)


class PackedLinear(nn.Module):
    """A linear layer on packed or quantised weights, without adapters."""

    def __init__(self, linear: nn.Linear, product: MakeProduct = Product) -> None:
        super().__init__()
        self._product = product(*_stacked([linear]))

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x)


@torch.inference_mode()
def lay_out(
    model: nn.Module, groups: Sequence[Sequence[str]], slots: AdapterSlots, product: MakeProduct = Product
) -> None:
    """Replace the linear layers of `model`: those of the slots' layout get adapters, and plain ones packed weights, or
    what else `product` makes of them.

    `groups` are the names of layers that share an input. A layer whose weight is the embedding's too leaves it there,
    beside a packed copy.
    """
    attach_slots(model, slots)
    for group in groups:
        linears = [_plain(model.get_submodule(f"{name}.base_layer")) for name in group if name in slots.layout.modules]
        known = [linear for linear in linears if linear is not None]
        if len(known) == len(group) and _alike(known):
            siblings = Siblings(known, group, slots, product)
            for index, name in enumerate(group):
                _replace(model, name, SiblingLinear(siblings, index))
    for name, module in list(model.named_modules()):
        linear = _plain(module)
        if linear is not None and (product is not Product or packable(linear.weight)):
            _replace(model, name, PackedLinear(linear, product))


def _plain(module: nn.Module) -> nn.Linear | None:
    """The module if it is exactly a linear layer, with weights that are plain tensors (not quantised ones)."""
    if type(module) is not nn.Linear or type(module.weight.data) is not Tensor:
        return None
    return module


def _alike(linears: Sequence[nn.Linear]) -> bool:
    return len({(linear.in_features, linear.weight.dtype, linear.bias is None) for linear in linears}) == 1


def _stacked(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights (Σ out, in) and biases (Σ out,) of layers that are alike."""
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    if len(linears) == 1:
        return linears[0].weight.detach(), biases[0] if biases else None
    return torch.cat([linear.weight.detach() for linear in linears]), torch.cat(biases) if biases else None


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
