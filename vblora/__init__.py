"""VB-LoRA: train, save, load and merge adapters mixed from a vector bank, and run many of them in one batch."""

from __future__ import annotations

from vblora.bank import VectorBank
from vblora.batched import AdapterSlots
from vblora.checkpoint import read_adapter, write_adapter
from vblora.config import VBLoRAConfig
from vblora.errors import (
    AdapterNameError,
    CheckpointError,
    ConfigError,
    DataError,
    IncompatibleError,
    MergeError,
    TargetError,
    VBLoRAError,
)
from vblora.export import export_lora
from vblora.model import VBLoRAModel, get_vblora_model
from vblora.parameters import param_groups

__all__ = [
    "AdapterNameError",
    "AdapterSlots",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "IncompatibleError",
    "MergeError",
    "TargetError",
    "VBLoRAConfig",
    "VBLoRAError",
    "VBLoRAModel",
    "VectorBank",
    "export_lora",
    "get_vblora_model",
    "param_groups",
    "read_adapter",
    "write_adapter",
]
