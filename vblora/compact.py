"""An adapter as the server keeps it in memory: one flat index tensor, one flat weight tensor, and a bank to share.

Knows where every sub-vector lies in a slot (`SlotLayout`), not what a slot or a batch is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vblora.checkpoint import AdapterCheckpoint, TopKModule, bank_hash
from vblora.errors import IncompatibleError
from vblora.mixture import ModuleShape

SMALLEST_BUCKET = 4


class Run(NamedTuple):
    """`length` consecutive elements of a composed adapter, from `source`, that lie at `target` in a slot's row."""

    target: int
    source: int
    length: int


@dataclass(frozen=True)
class CompactAdapter:
    """Top-k metadata in the order of a slot's row, so that composing is one `embedding_bag` and a copy a run.

    `indices` is (N, k) in the smallest integer dtype that holds the bank's rows, `weights` is (N, k − 1) float32: the
    last weight of a sub-vector is one minus the others. `bank` is (h, b) float32, on the CPU.
    """

    rank: int
    bucket: int
    indices: Tensor
    weights: Tensor
    bank: Tensor
    bank_hash: str
    runs: tuple[Run, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the metadata, without the bank."""
        return self.indices.nbytes + self.weights.nbytes

    def with_bank(self, bank: Tensor) -> CompactAdapter:
        """The same adapter on another copy of the same bank."""
        return replace(self, bank=bank)

    def compose(self) -> Tensor:
        """Every sub-vector of A and B, (N · b,) float32, in the order that `runs` speaks of."""
        last = (1.0 - self.weights.sum(-1, keepdim=True)).clamp_min(0.0)
        weights = torch.cat((self.weights, last), dim=-1)
        composed = F.embedding_bag(self.indices.int(), self.bank, per_sample_weights=weights, mode="sum")
        return composed.flatten()


class SlotLayout:
    """Where the A and B of each adaptable module lie in a slot's flat row.

    For rank bucket R, module m occupies R · (in + out) consecutive elements: A as (R, in), then Bᵀ as (R, out). An
    adapter of rank r ≤ R fills the first r rows of both; the others stay zero and add nothing.
    """

    def __init__(self, modules: dict[str, ModuleShape], max_rank: int, *, output_layer: str | None = None) -> None:
        self.modules = modules
        self.max_rank = max_rank
        self.output_layer = output_layer
        self.buckets = tuple(_buckets(max_rank))
        self.width = sum(shape.in_features + shape.out_features for shape in modules.values())

    @classmethod
    def from_model(
        cls, model: nn.Module, *, max_rank: int = 16, adaptable: Callable[[str], bool] = lambda name: True
    ) -> SlotLayout:
        """Every `adaptable` linear layer of `model` (`nn.Linear`, transformers' `Conv1D`) but its output layer."""
        output = output_layer_name(model)
        named = ((name, linear_shape(module)) for name, module in model.named_modules() if name != output)
        shapes = {name: shape for name, shape in named if shape is not None and adaptable(name)}
        return cls(shapes, max_rank, output_layer=output)

    def bucket(self, rank: int) -> int:
        """The smallest bucket that holds `rank`."""
        return next(bucket for bucket in self.buckets if bucket >= rank)

    def slot_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a slot that holds an adapter of the highest rank."""
        return self.buckets[-1] * self.width * dtype.itemsize

    def starts(self, bucket: int) -> Iterator[tuple[str, ModuleShape, int]]:
        """Each module with its shape and where its elements begin in a row of `bucket`."""
        start = 0
        for name, shape in self.modules.items():
            yield name, shape, start
            start += bucket * (shape.in_features + shape.out_features)

    def check(self, checkpoint: AdapterCheckpoint) -> None:
        """Raise `IncompatibleError`, naming the field at fault, if the server cannot run this adapter."""
        config = checkpoint.config
        if config.r > self.max_rank:
            raise IncompatibleError(f"r is {config.r}, but this server takes ranks up to {self.max_rank}", "r")
        if config.bias != "none":
            raise IncompatibleError(f'bias is "{config.bias}", but this server applies no biases: use "none"', "bias")
        if config.modules_to_save or checkpoint.extras:
            raise IncompatibleError(
                "modules_to_save must be empty: this server shares all modules of the base model", "modules_to_save"
            )
        self._check_modules(checkpoint)

    def _check_modules(self, checkpoint: AdapterCheckpoint) -> None:
        if self.output_layer in checkpoint.modules:
            raise IncompatibleError(
                f"target_modules includes the output layer {self.output_layer}, which this server does not adapt",
                "target_modules",
            )
        unknown = [name for name in checkpoint.modules if name not in self.modules]
        if unknown:
            shown = ", ".join(sorted(unknown)[:3])
            raise IncompatibleError(
                f"target_modules: {len(unknown)} of the adapter's modules are no linear layer of the base: {shown}",
                "target_modules",
            )
        length = checkpoint.config.vector_length
        for name, module in checkpoint.modules.items():
            found = module.shape(length)
            if found != self.modules[name]:
                raise IncompatibleError(
                    f"target_modules: {name} maps {found.in_features} to {found.out_features} in the adapter, "
                    f"{self.modules[name].in_features} to {self.modules[name].out_features} in the base model",
                    "target_modules",
                )

    def compact(self, checkpoint: AdapterCheckpoint) -> CompactAdapter:
        """Permute an adapter's metadata into the order of this layout.

        Raises `IncompatibleError` for an adapter that does not fit, as `check` does.
        """
        self.check(checkpoint)
        checkpoint = checkpoint.topk()
        rank, length = checkpoint.config.r, checkpoint.config.vector_length
        bucket = self.bucket(rank)
        indices: list[Tensor] = []
        weights: list[Tensor] = []
        runs: list[Run] = []
        source = 0
        for name, shape, start in self.starts(bucket):
            module = checkpoint.modules.get(name)
            if not isinstance(module, TopKModule):
                continue
            # B is stored (out/b, r, k); the slot holds Bᵀ, so its rows come rank by rank, as A's do.
            for topk, features, target in (
                ((module.a.indices, module.a.weights), shape.in_features, start),
                ((module.b.indices.transpose(0, 1), module.b.weights.transpose(0, 1)), shape.out_features,
                 start + bucket * shape.in_features),
            ):  # fmt: skip
                indices.append(topk[0].flatten(0, 1))
                weights.append(topk[1].flatten(0, 1)[:, :-1])
                _append_run(runs, Run(target, source, rank * features))
                source += rank * features
        assert source == sum(index.shape[0] for index in indices) * length
        bank = checkpoint.bank.float().contiguous()
        return CompactAdapter(
            rank, bucket, torch.cat(indices), torch.cat(weights).float(), bank, bank_hash(checkpoint.bank), tuple(runs)
        )


def linear_shape(module: nn.Module) -> ModuleShape | None:
    """The shape of a linear layer; None for anything else. `Conv1D` keeps its weight as (in, out)."""
    if isinstance(module, nn.Linear):
        return ModuleShape(module.in_features, module.out_features)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return ModuleShape(weight.shape[0], weight.shape[1])
    return None


def output_layer_name(model: nn.Module) -> str | None:
    """The name of the layer that makes the logits, where the model tells (transformers' `get_output_embeddings`)."""
    tell = getattr(model, "get_output_embeddings", None)
    output = tell() if callable(tell) else None
    return next((name for name, module in model.named_modules() if module is output), None) if output else None


def _buckets(max_rank: int) -> Iterator[int]:
    bucket = SMALLEST_BUCKET
    while bucket < max_rank:
        yield bucket
        bucket *= 2
    yield bucket


def _append_run(runs: list[Run], run: Run) -> None:
    """Add a run, joined to the last one where both sides continue it."""
    if runs and runs[-1].target + runs[-1].length == run.target:
        runs[-1] = Run(runs[-1].target, runs[-1].source, runs[-1].length + run.length)
    else:
        runs.append(run)
