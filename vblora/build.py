"""Make an adapter's layers, drawn at random or from a checkpoint. Knows the base model's layers, not which are wrapped
or active."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from vblora.bank import VectorBank
from vblora.checkpoint import AdapterCheckpoint, LogitsModule
from vblora.config import VBLoRAConfig
from vblora.errors import ConfigError
from vblora.inject import base_layer, plain_path, saved_names, short_names
from vblora.layer import LayerAdapter, LogitsAdapter, TopKAdapter
from vblora.mixture import ModuleShape

Shapes = Mapping[str, ModuleShape]


def device_of(model: nn.Module, path: str) -> torch.device:
    """Where the linear layer at `path` computes."""
    return base_layer(model, path).get_parameter("weight").device


def random_bank(config: VBLoRAConfig, device: torch.device) -> VectorBank:
    """A bank as the configuration asks for."""
    return VectorBank.random(config.num_vectors, config.vector_length, config.init_vector_bank_bound, device=device)


def check_bank(config: VBLoRAConfig, bank: VectorBank) -> None:
    """Raise `ConfigError` unless a given bank has the configuration's shape."""
    if tuple(bank.vectors.shape) != (config.num_vectors, config.vector_length):
        raise ConfigError(
            f"num_vectors and vector_length are {config.num_vectors} and {config.vector_length}, "
            f"but the bank has shape {tuple(bank.vectors.shape)}"
        )


def random_adapters(
    model: nn.Module, config: VBLoRAConfig, shapes: Shapes, bank: VectorBank, device: torch.device | None
) -> dict[str, LayerAdapter]:
    """Trainable layers by path, on `device` or else each on its base layer's."""
    return {
        path: LogitsAdapter.random(
            bank, config, shape.in_features, shape.out_features, device or device_of(model, path)
        )
        for path, shape in shapes.items()
    }


def loaded_adapters(
    model: nn.Module, checkpoint: AdapterCheckpoint, shapes: Shapes, bank: VectorBank
) -> dict[str, LayerAdapter]:
    """A checkpoint's layers by path: logits in float32, top-k metadata as it is."""
    config = checkpoint.config
    adapters: dict[str, LayerAdapter] = {}
    for path in shapes:
        content = checkpoint.modules[plain_path(path)]
        if isinstance(content, LogitsModule):
            content = LogitsModule(content.a.float(), content.b.float())
            adapters[path] = LogitsAdapter(bank, content, config.topk, config.vblora_dropout)
        else:
            adapters[path] = TopKAdapter(bank, content, config.vblora_dropout)
        adapters[path].to(device_of(model, path))
    return adapters


def settled(model: nn.Module, config: VBLoRAConfig, shapes: Shapes) -> VBLoRAConfig:
    """The configuration as it is saved: targets by name, the right `fan_in_fan_out` (changing it warns), the heads of
    its task type among `modules_to_save`, the base model's name."""
    conv = any(not isinstance(base_layer(model, path), nn.Linear) for path in shapes)
    if conv != config.fan_in_fan_out:
        kind = "Conv1D" if conv else "torch.nn.Linear"
        warnings.warn(f"fan_in_fan_out set to {conv}: the targets are {kind} layers", stacklevel=4)
    targets = config.target_modules if isinstance(config.target_modules, list) else short_names(model, shapes)
    base_name = config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    return replace(
        config,
        target_modules=targets,
        fan_in_fan_out=conv,
        modules_to_save=saved_names(config) or None,
        base_model_name_or_path=base_name,
    )
