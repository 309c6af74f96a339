"""One linear layer with adapters: `y = base(x) + Σ dropout(x) Aᵀ Bᵀ` over the active ones, trainable.

Knows its base layer, its adapters and their banks; not the model around it, nor rows with different adapters (those
are `batched`'s, whose reference this is). There is no scaling factor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vblora import kernels
from vblora.bank import VectorBank
from vblora.checkpoint import LogitsModule, TopKModule
from vblora.config import VBLoRAConfig
from vblora.errors import ConfigError
from vblora.mixture import TopK, compose_all, matrix_a, matrix_b, topk_mixture

Matrices = tuple[Tensor, Tensor]
ONE_ROW = torch.tensor([1], dtype=torch.int32)  # what a single row tells the kernel: it has an adapter
BASE_ROWS = "__base__"  # PEFT's name for rows that use no adapter


def module_key(adapter_name: str) -> str:
    """A name for torch's containers, which refuse dots and some words; different adapters have different keys."""
    return "adapter_" + quote(adapter_name, safe="").replace(".", "%2E")


class Composed:
    """A and Bᵀ for use without gradients, one behind the other as the compiled kernel wants them."""

    def __init__(self, state: object, a: Tensor, b_transposed: Tensor) -> None:
        self.state = state  # of what they were made of
        flat = torch.cat((a.flatten(), b_transposed.flatten()))
        self.matrices: Matrices = flat[: a.numel()].view_as(a), flat[a.numel() :].view_as(b_transposed)
        self.dtype = a.dtype
        table = flat.expand(2, -1)  # the kernel's row 0 stands for no adapter, and is never read
        self._delta = kernels.Delta(table, ONE_ROW, torch.tensor([[0, b_transposed.shape[1]]]), len(a))
        self._usable = kernels.usable(flat) and len(a) % kernels.RANKS == 0

    def takes(self, x: Tensor, weight: Tensor) -> bool:
        """Whether `linear` does: x and a plain weight (no quantised one) in the adapter's dtype, and no autocast."""
        if not self._usable or type(weight) is not nn.Parameter or torch.is_autocast_enabled("cpu"):
            return False
        return x.dtype == self.dtype and weight.dtype == self.dtype

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x Wᵀ + bias + x Aᵀ Bᵀ`: x (1, in) → (1, out)."""
        return kernels.linear_with_delta(x, weight, bias, self._delta)


class LayerAdapter(nn.Module, ABC):
    """One adapter's share of one layer; the bank stays the model's, and is only referred to here."""

    def __init__(self, bank: VectorBank, dropout: float) -> None:
        super().__init__()
        self._bank = (bank,)  # in a tuple, so that torch does not register it once a layer
        self.dropout = dropout
        self._composed: Composed | None = None
        self.given: Matrices | None = None  # composed by the model, for all layers at once

    @property
    def bank(self) -> VectorBank:
        return self._bank[0]

    def use_bank(self, bank: VectorBank) -> None:
        """Mix from this bank from now on."""
        self._bank = (bank,)

    @property
    @abstractmethod
    def content(self) -> LogitsModule | TopKModule:
        """What a checkpoint keeps of it."""

    @abstractmethod
    def mixtures(self) -> tuple[TopK, TopK]:
        """The top-k metadata of A and of B."""

    def matrices(self) -> Matrices:
        """A (r, in) and Bᵀ (r, out). Without gradients they are composed once and kept until a tensor changes."""
        if self.given is not None:
            return self.given
        kept = self._kept()
        return self._compose() if kept is None else kept.matrices

    def _kept(self) -> Composed | None:
        """The matrices composed before, or now; None while they may change unseen, or gradients want to know."""
        if torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled():
            self._composed = None
            return None
        state = self._state()
        if state is None:
            return None
        if self._composed is None or self._composed.state != state:
            self._composed = Composed(state, *self._compose())
        return self._composed

    def add_delta(self, x: Tensor, y: Tensor, *, in_place: bool = False) -> Tensor:
        """`y + dropout(x) Aᵀ Bᵀ`: x (n, in) and y (n, out) → (n, out), in the wider of the adapter's dtype and y's.

        `in_place` allows to change y where the dtype is its own.
        """
        a, b_transposed = self.matrices()
        if x.dtype != a.dtype:
            x = x.to(a.dtype)
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        low = F.linear(x, a)
        wide = y if y.dtype == a.dtype else y.to(torch.promote_types(y.dtype, a.dtype))
        if (in_place or wide is not y) and low.dtype == wide.dtype:
            return wide.addmm_(low, b_transposed)
        return torch.addmm(wide, low, b_transposed)  # under autocast, which casts for this one, dtypes may differ

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The base layer's product of a single row with the delta, as one operation; None where there is no such."""
        if self.given is not None or self.training:
            return None
        kept = self._kept()
        return kept.linear(x, weight, bias) if kept is not None and kept.takes(x, weight) else None

    def _compose(self) -> Matrices:
        mixtures = self.mixtures()
        sub_a, sub_b = compose_all(mixtures, self.bank.vectors.to(mixtures[0].weights.device))
        return matrix_a(sub_a), matrix_b(sub_b)

    def _state(self) -> object:
        """Changes whenever a tensor does that the matrices are made of; None where torch does not count changes."""
        tensors = (*self._bank[0]._parameters.values(), *self._parameters.values(), *self._buffers.values())
        try:
            return [(tensor.data_ptr(), tensor._version) for tensor in tensors if tensor is not None]
        except RuntimeError:  # made in inference mode
            return None


class LogitsAdapter(LayerAdapter):
    """A trainable adapter: parameters `logits_a` (r, in/b, h) and `logits_b` (out/b, r, h)."""

    def __init__(self, bank: VectorBank, content: LogitsModule, topk: int, dropout: float) -> None:
        super().__init__(bank, dropout)
        self.topk = topk
        self.logits_a = nn.Parameter(content.a)
        self.logits_b = nn.Parameter(content.b)

    @classmethod
    def random(
        cls, bank: VectorBank, config: VBLoRAConfig, in_features: int, out_features: int, device: torch.device
    ) -> LogitsAdapter:
        """Logits drawn from N(0, init_logits_std), from torch's default random stream."""
        tiles_in, tiles_out = in_features // config.vector_length, out_features // config.vector_length
        a = torch.empty(config.r, tiles_in, config.num_vectors, device=device)
        b = torch.empty(tiles_out, config.r, config.num_vectors, device=device)
        for logits in (a, b):
            logits.normal_(0, config.init_logits_std)
        return cls(bank, LogitsModule(a, b), config.topk, config.vblora_dropout)

    @property
    def content(self) -> LogitsModule:
        return LogitsModule(self.logits_a.detach(), self.logits_b.detach())

    def mixtures(self) -> tuple[TopK, TopK]:
        return topk_mixture(self.logits_a, self.topk), topk_mixture(self.logits_b, self.topk)


class TopKAdapter(LayerAdapter):
    """An adapter for inference: top-k metadata in buffers, never made dense."""

    indices_a: Tensor
    weights_a: Tensor
    indices_b: Tensor
    weights_b: Tensor

    def __init__(self, bank: VectorBank, content: TopKModule, dropout: float) -> None:
        super().__init__(bank, dropout)
        for side, mixture in (("a", content.a), ("b", content.b)):
            self.register_buffer(f"indices_{side}", mixture.indices)
            self.register_buffer(f"weights_{side}", mixture.weights)

    @property
    def content(self) -> TopKModule:
        return TopKModule(*self.mixtures())

    def mixtures(self) -> tuple[TopK, TopK]:
        return TopK(self.indices_a, self.weights_a), TopK(self.indices_b, self.weights_b)


def _plain(layer: nn.Module) -> dict[str, Any] | None:
    """The parameters of a layer whose output is nobody else's, so that deltas may be added in place: a plain linear
    layer makes a new one each time, keeps none for its gradient, and has no hooks that might. None for any other layer.
    """
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return layer._parameters if type(layer) is nn.Linear and not hooks and len(layer._parameters) == 2 else None


class AdaptedLinear(nn.Module):
    """Wraps a linear layer. `active` and `merged` name adapters; those that do not target this layer are skipped.

    `rows` names an adapter for each row of the batch instead. `original_weight` is the base layer's own parameter
    while a sum of weights and deltas stands in for it.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self._by_name: dict[str, LayerAdapter] = {}
        self.active: list[str] = []
        self.merged: list[str] = []
        self.rows: list[str] | None = None
        self.enabled = True
        self.original_weight: tuple[nn.Parameter] | None = None  # in a tuple: torch must not register it
        self.train(base_layer.training)

    def add(self, name: str, adapter: LayerAdapter) -> None:
        """Register what the adapter of this name adds here."""
        self.adapters[module_key(name)] = adapter.train(self.training)
        self._by_name[name] = adapter

    def remove(self, name: str) -> None:
        """Forget an adapter, if it is there."""
        if self._by_name.pop(name, None) is not None:
            del self.adapters[module_key(name)]

    def adapter(self, name: str) -> LayerAdapter | None:
        """What the adapter of this name adds here, None if it does not target this layer."""
        return self._by_name.get(name)

    def targeted_by(self, names: Sequence[str]) -> list[LayerAdapter]:
        """Those of the named adapters that target this layer."""
        return [self._by_name[name] for name in names if name in self._by_name]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base_layer = self._modules["base_layer"]  # as an attribute it would take microseconds to find
        assert base_layer is not None
        adapters = self.targeted_by([name for name in self.active if name not in self.merged])
        if not self.enabled or not (adapters or self.rows):
            result: Tensor = base_layer(x, *args, **kwargs)
            return result
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y: Tensor
        plain = _plain(base_layer) if not args and not kwargs else None
        if plain is not None and len(flat) == len(adapters) == 1 and self.rows is None:
            row = adapters[0].linear(flat, plain["weight"], plain["bias"])
            if row is not None:
                return row if x.dim() == 2 else row.view(*x.shape[:-1], -1)
        if plain is not None:
            y = result = F.linear(flat, plain["weight"], plain["bias"])  # no view: it is changed in place
        else:
            result = base_layer(x, *args, **kwargs)
            y = result.reshape(-1, result.shape[-1])
        if self.rows is not None:
            y = self._add_to_rows(flat, y, self.rows)
        else:
            for adapter in adapters:
                y = adapter.add_delta(flat, y, in_place=plain is not None)
        if y.dtype != result.dtype:
            y = y.to(result.dtype)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)

    def _add_to_rows(self, x: Tensor, result: Tensor, rows: list[str]) -> Tensor:
        """Each row's own delta; `x` and `result` hold the tokens of the first row, then of the next (or its beams').

        Raises `ConfigError` where they cannot: a layer that sees some of the tokens only, as an expert does.
        """
        repeats, rest = divmod(len(x), len(rows))
        if rest:
            raise ConfigError(f"adapter_names: a layer sees {len(x)} tokens, no multiple of the {len(rows)} rows")
        y = result.clone()
        for name in dict.fromkeys(rows):
            for adapter in self.targeted_by([name]):
                mine = torch.tensor([row == name for row in rows], device=x.device).repeat_interleave(repeats)
                y[mine] = adapter.add_delta(x[mine], y[mine]).to(y.dtype)
        return y

    def __getattr__(self, name: str) -> Any:
        """Models ask their layers for `weight`, `in_features` and the like: the base layer answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)
