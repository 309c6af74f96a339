"""Write a VB-LoRA adapter as a LoRA that computes the same: its composed A and B, with lora_alpha = r.

PEFT's LoRA adds `(alpha / r) · x Aᵀ Bᵀ`, so that with alpha = r nothing is approximated. Knows files, not models.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from vblora.checkpoint import CONFIG_FILE, PREFIX, WEIGHTS_FILE, AdapterCheckpoint, TopKModule, read_adapter
from vblora.mixture import compose_all, matrix_a, matrix_b
from vblora.tensorfile import write_atomically

# What means the same in both configurations, under the same name.
_SHARED = (
    "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform",
    "modules_to_save", "r", "revision", "task_type",
)  # fmt: skip


def export_lora(source_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> None:
    """Write the adapter in `source_dir` as a PEFT LoRA into `out_dir`, in float32, each file atomically.

    Raises `CheckpointError` or `IncompatibleError` as `read_adapter` does.
    """
    checkpoint = read_adapter(source_dir)
    config = json.dumps(lora_config(checkpoint), indent=2, sort_keys=True) + "\n"
    write_atomically(Path(out_dir) / WEIGHTS_FILE, save(lora_tensors(checkpoint), {"format": "pt"}))
    write_atomically(Path(out_dir) / CONFIG_FILE, config.encode())


@torch.no_grad()
def lora_tensors(checkpoint: AdapterCheckpoint) -> dict[str, Tensor]:
    """`lora_A.weight` (r, in) and `lora_B.weight` (out, r) of every module, and the extras as they are."""
    checkpoint = checkpoint.topk()
    modules = {path: module for path, module in checkpoint.modules.items() if isinstance(module, TopKModule)}
    parts = compose_all([side for module in modules.values() for side in (module.a, module.b)], checkpoint.bank.float())
    tensors = checkpoint.stored_extras()
    for path, sub_a, sub_b in zip(modules, parts[::2], parts[1::2], strict=True):
        tensors[f"{PREFIX}{path}.lora_A.weight"] = matrix_a(sub_a).contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = matrix_b(sub_b).T.contiguous()
    return tensors


def lora_config(checkpoint: AdapterCheckpoint) -> dict[str, Any]:
    """What PEFT's `LoraConfig` needs to know; targets that are no list of names become one of whole paths."""
    config = checkpoint.config
    targets = config.target_modules
    values = config.to_dict()
    return {name: values[name] for name in _SHARED} | {
        "peft_type": "LORA",
        "lora_alpha": config.r,
        "lora_dropout": config.vblora_dropout,
        "bias": "lora_only" if config.bias == "vblora_only" else config.bias,
        "target_modules": sorted(targets) if isinstance(targets, list) else sorted(checkpoint.modules),
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
