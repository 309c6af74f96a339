"""Adapters as files that PEFT reads and writes: `adapter_config.json` and `adapter_model.safetensors`, validated.

Knows the format, not the base model: whether a module exists there is checked where an adapter meets a model.

Two modes. *Full* keeps logits A (r, in/b, h) and B (out/b, r, h), and can be trained on. *Top-k only* keeps, for each
sub-vector, k indices and the k - 1 largest softmax weights (the last is one minus the others), and cannot.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from vblora.config import VBLoRAConfig
from vblora.errors import CheckpointError, ConfigError
from vblora.mixture import ModuleShape, TopK, index_dtype, topk_mixture
from vblora.tensorfile import MAX_FILE_BYTES, MAX_JSON_BYTES, load_tensors, parse_json, read_bytes, write_atomically

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BANK_KEY = "base_model.vblora_vector_bank"
PREFIX = "base_model.model."
SIDES = ("A", "B")
MAX_WEIGHTS_BYTES = MAX_FILE_BYTES
_SHOWN = 200
_WEIGHT_SLACK = 1e-3
_ROUNDING = 1e-6
_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})
# With bias "all", PEFT writes the biases of modules_to_save again under the names of its wrapper.
_REPEATED = re.compile(r"\.(original_module|modules_to_save)\.(.*\.)?bias$")
_INTEGERS = frozenset({torch.uint8, torch.int16, torch.int32, torch.int64})


@dataclass(frozen=True)
class TopKModule:
    """Top-k metadata of one module: `a` (r, in/b, k) and `b` (out/b, r, k)."""

    a: TopK
    b: TopK

    def shape(self, vector_length: int) -> ModuleShape:
        """The linear layer that it adapts."""
        return ModuleShape(self.a.indices.shape[1] * vector_length, self.b.indices.shape[0] * vector_length)


@dataclass(frozen=True)
class LogitsModule:
    """Logits of one module: `a` (r, in/b, h) and `b` (out/b, r, h)."""

    a: Tensor
    b: Tensor

    def shape(self, vector_length: int) -> ModuleShape:
        """The linear layer that it adapts."""
        return ModuleShape(self.a.shape[1] * vector_length, self.b.shape[0] * vector_length)


@dataclass(frozen=True)
class AdapterCheckpoint:
    """One adapter. `bank` is (h, b); `modules` goes by the module's path in the base model; `extras` holds biases and
    modules_to_save by their names in the base model."""

    config: VBLoRAConfig
    bank: Tensor
    modules: Mapping[str, TopKModule | LogitsModule]
    extras: Mapping[str, Tensor]

    @property
    def trainable(self) -> bool:
        """Whether training can go on from here: only logits know about vectors outside the top k."""
        return all(isinstance(module, LogitsModule) for module in self.modules.values())

    def stored_extras(self) -> dict[str, Tensor]:
        """The extras by their names in a file: PEFT's, for which an adapted layer's bias is that of its base layer."""
        stored = {}
        for name, tensor in self.extras.items():
            path, _, leaf = name.rpartition(".")
            stored[f"{PREFIX}{path}.base_layer.{leaf}" if path in self.modules else PREFIX + name] = tensor
        return stored

    def topk(self) -> AdapterCheckpoint:
        """The same adapter with top-k metadata only; indices take the smallest dtype that holds them."""
        dtype = index_dtype(self.config.num_vectors)

        def small(side: TopK | Tensor) -> TopK:
            mixture = side if isinstance(side, TopK) else topk_mixture(side.detach().float(), self.config.topk)
            return TopK(mixture.indices.to(dtype), mixture.weights)

        modules = {name: TopKModule(small(module.a), small(module.b)) for name, module in self.modules.items()}
        config = replace(self.config, save_only_topk_weights=True)
        return AdapterCheckpoint(config, self.bank, modules, self.extras)


def read_adapter(directory: str | os.PathLike[str]) -> AdapterCheckpoint:
    """Read and validate an adapter's folder; other files in it are ignored.

    Raises `CheckpointError` for whatever is wrong with the files, `IncompatibleError` for another kind of adapter.
    """
    folder = Path(directory)
    config = read_bytes(folder / CONFIG_FILE, MAX_JSON_BYTES)
    if not (folder / WEIGHTS_FILE).exists() and any(folder.glob("*.bin")):
        raise CheckpointError(f"{WEIGHTS_FILE} is missing: only safetensors are read, never .bin files")
    return read_adapter_bytes(config, read_bytes(folder / WEIGHTS_FILE, MAX_WEIGHTS_BYTES))


def read_adapter_bytes(config: bytes, weights: bytes) -> AdapterCheckpoint:
    """Validate the contents of the two files of an adapter; raises as `read_adapter` does."""
    return _checked(_parsed(config), adapter_tensors(weights))


def read_adapter_tensors(config: bytes, tensors: Mapping[str, Tensor]) -> AdapterCheckpoint:
    """Validate the contents of a configuration's file and what `adapter_tensors` told of the other."""
    return _checked(_parsed(config), tensors)


def adapter_tensors(weights: bytes) -> dict[str, Tensor]:
    """The tensors of an adapter's file by name, each once, not yet checked. Raises `CheckpointError`."""
    return {key: tensor for key, tensor in load_tensors(weights).items() if not _REPEATED.search(key)}


def _parsed(config: bytes) -> VBLoRAConfig:
    if len(config) > MAX_JSON_BYTES:
        raise CheckpointError(f"{CONFIG_FILE} is larger than {MAX_JSON_BYTES} bytes")
    values = parse_json(config, CONFIG_FILE)
    try:
        return VBLoRAConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{CONFIG_FILE}: {error}") from error


def write_adapter(
    directory: str | os.PathLike[str], checkpoint: AdapterCheckpoint, *, topk_only: bool | None = None
) -> None:
    """Write an adapter as PEFT would, each file atomically.

    `topk_only` defaults to the configuration's `save_only_topk_weights`. Raises `CheckpointError` when logits are
    asked of an adapter that has none.
    """
    checkpoint = _in_mode(checkpoint, checkpoint.config.save_only_topk_weights if topk_only is None else topk_only)
    config = replace(checkpoint.config, inference_mode=True).to_dict()
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder = Path(directory)
    write_atomically(folder / WEIGHTS_FILE, save(stored_tensors(checkpoint), {"format": "pt"}))
    write_atomically(folder / CONFIG_FILE, text.encode())


def stored_tensors(checkpoint: AdapterCheckpoint) -> dict[str, Tensor]:
    """The tensors of an adapter's file, by their names there."""
    config = checkpoint.config
    tensors = {BANK_KEY: checkpoint.bank}
    for path, module in checkpoint.modules.items():
        for side, content in zip(SIDES, (module.a, module.b), strict=True):
            key = f"{PREFIX}{path}.vblora_logits_{side}"
            if isinstance(content, TopK):
                tensors[f"{key}_topk_indices"] = content.indices.to(stored_index_dtype(config.num_vectors))
                tensors[f"{key}_topk_weights"] = content.weights[..., :-1].float()
            else:
                tensors[key] = content
    tensors |= checkpoint.stored_extras()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def stored_index_dtype(num_vectors: int) -> torch.dtype:
    """PEFT's dtype of indices: one bit wider than needed at 256, 32,768 and 2,147,483,648 vectors."""
    return index_dtype(num_vectors + 1)


def content_hash(checkpoint: AdapterCheckpoint) -> str:
    """64 hex digits over the canonical configuration and every tensor as it is stored (name, dtype, shape, bytes).

    A checkpoint and its top-k form are different contents; bookkeeping, like the PEFT version, is not content.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config.canonical(), sort_keys=True).encode())
    for name, tensor in sorted(stored_tensors(checkpoint).items()):
        digest.update(f"\n{name}\n".encode())
        _update(digest.update, tensor)
    return digest.hexdigest()


def bank_hash(bank: Tensor) -> str:
    """64 hex digits over the shape, dtype and bytes of a bank."""
    digest = hashlib.sha256()
    _update(digest.update, bank)
    return digest.hexdigest()


def _update(update: Callable[[Any], None], tensor: Tensor) -> None:
    update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _in_mode(checkpoint: AdapterCheckpoint, topk_only: bool) -> AdapterCheckpoint:
    if topk_only:
        return checkpoint.topk()
    if not checkpoint.trainable:
        raise CheckpointError("a top-k-only adapter has no logits to write: write it with topk_only")
    return replace(checkpoint, config=replace(checkpoint.config, save_only_topk_weights=False))


def _checked(config: VBLoRAConfig, tensors: Mapping[str, Tensor]) -> AdapterCheckpoint:
    modules, extra_keys = _names(config, tensors)
    bank = _float(tensors, BANK_KEY, (config.num_vectors, config.vector_length))
    read = _read_topk if config.save_only_topk_weights else _read_logits
    extras = {key.removeprefix(PREFIX).replace(".base_layer.", "."): _value(key, tensors[key]) for key in extra_keys}
    return AdapterCheckpoint(config, bank, {path: read(config, tensors, path) for path in modules}, extras)


def _suffixes(config: VBLoRAConfig) -> list[str]:
    kinds = ("_topk_indices", "_topk_weights") if config.save_only_topk_weights else ("",)
    return [f".vblora_logits_{side}{kind}" for side in SIDES for kind in kinds]


def _names(config: VBLoRAConfig, tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """The modules' paths and the keys of extras; every missing and every unexpected name is found at once."""
    suffixes = _suffixes(config)
    modules = {
        key.removeprefix(PREFIX).removesuffix(suffix): None
        for key in tensors
        for suffix in suffixes
        if key.startswith(PREFIX) and key.endswith(suffix)
    }
    expected = {BANK_KEY, *(f"{PREFIX}{path}{suffix}" for path in modules for suffix in suffixes)}
    extras = [key for key in tensors if key not in expected and _is_extra(config, key)]
    refuse_names(missing=expected - tensors.keys(), unexpected=tensors.keys() - expected - set(extras))
    if not modules:
        raise CheckpointError(f"no tensor named {PREFIX}<module>{suffixes[0]}: the file adapts no module")
    return sorted(modules), extras


def _is_extra(config: VBLoRAConfig, key: str) -> bool:
    if not key.startswith(PREFIX) or "vblora_" in key:
        return False
    if config.bias != "none" and key.endswith(".bias"):
        return True
    return any(f".{name}." in key for name in config.modules_to_save or ())


def refuse_names(*, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raise `CheckpointError` that names every tensor that is missing and every one that is not expected, if any."""
    faults = [
        f"{', '.join(sorted(names)[:_SHOWN])}"
        + (f" (and {len(names) - _SHOWN} more)" if len(names) > _SHOWN else "")
        + f": {fault}"
        for fault, names in (("is missing", missing), ("is not expected here", unexpected))
        if names
    ]
    if faults:
        raise CheckpointError("; ".join(faults))


def _sides(config: VBLoRAConfig, tensors: Mapping[str, Tensor], path: str, kind: str, last: int) -> Iterator[
    tuple[str, tuple[int, ...]]
]:  # fmt: skip
    """Key and wanted shape of A's and B's tensor of one kind; the number of sub-vectors is the tensor's own."""
    for side, tiles_dim in zip(SIDES, (1, 0), strict=True):
        key = f"{PREFIX}{path}.vblora_logits_{side}{kind}"
        shape = tensors[key].shape
        tiles = shape[tiles_dim] if len(shape) == 3 else 1
        yield key, (config.r, max(tiles, 1), last) if side == "A" else (max(tiles, 1), config.r, last)


def _read_logits(config: VBLoRAConfig, tensors: Mapping[str, Tensor], path: str) -> LogitsModule:
    a, b = (_float(tensors, key, shape) for key, shape in _sides(config, tensors, path, "", config.num_vectors))
    return LogitsModule(a, b)


def _read_topk(config: VBLoRAConfig, tensors: Mapping[str, Tensor], path: str) -> TopKModule:
    a, b = (
        TopK(_indices(config, tensors, key, shape), _weights(tensors, key, shape))
        for key, shape in _sides(config, tensors, path, "_topk_indices", config.topk)
    )
    return TopKModule(a, b)


def _indices(config: VBLoRAConfig, tensors: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    indices = _shaped(key, tensors[key], shape)
    if indices.dtype not in _INTEGERS:
        raise CheckpointError(f"{key}: must be integers, not {indices.dtype}")
    if int(indices.min()) < 0 or int(indices.max()) >= config.num_vectors:
        raise CheckpointError(f"{key}: an index lies outside [0, {config.num_vectors})")
    ordered = indices.sort(dim=-1).values
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise CheckpointError(f"{key}: the {config.topk} indices of a sub-vector must be distinct")
    return indices.to(index_dtype(config.num_vectors))


def _weights(tensors: Mapping[str, Tensor], indices_key: str, shape: tuple[int, ...]) -> Tensor:
    """All k weights in float32. Rounding can push a stored sum past one: the last weight is clamped, and what is more
    than float32's own rounding is divided out (so that reading and writing again gives the same bytes)."""
    key = indices_key.replace("_topk_indices", "_topk_weights")
    stored = _float(tensors, key, (*shape[:-1], shape[-1] - 1))
    weights = stored.float()
    total = weights.sum(-1, keepdim=True)
    if (weights < 0).any() or (weights > 1).any():
        raise CheckpointError(f"{key}: a weight lies outside [0, 1]")
    if (total > 1 + max(_WEIGHT_SLACK, torch.finfo(stored.dtype).eps)).any():
        raise CheckpointError(f"{key}: the weights of a sub-vector add up to more than 1")
    excess = torch.where(total > 1 + _ROUNDING, total, 1.0)
    return torch.cat((weights / excess, (1 - total).clamp_min(0)), dim=-1)


def _float(tensors: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    return _finite(key, _shaped(key, tensors[key], shape))


def _value(key: str, tensor: Tensor) -> Tensor:
    """A tensor of a whole module: counters, like batch normalisation's, are integers."""
    return tensor if tensor.dtype in _INTEGERS else _finite(key, tensor)


def _shaped(key: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{key}: shape {list(tensor.shape)} does not match the configuration, {list(shape)}")
    return tensor


def _finite(key: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in _FLOATS:
        raise CheckpointError(f"{key}: must be floating-point numbers, not {tensor.dtype}")
    if not tensor.isfinite().all():
        raise CheckpointError(f"{key}: holds NaN or infinity")
    return tensor
