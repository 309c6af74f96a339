"""Which parameters are trained at which rate, and how many a saved adapter holds. Knows modules, not optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vblora.bank import VectorBank
from vblora.checkpoint import AdapterCheckpoint, TopKModule, stored_index_dtype
from vblora.layer import LogitsAdapter


def param_groups(
    model: nn.Module, logits_lr: float = 1e-2, bank_lr: float = 1e-3, other_lr: float = 1e-3
) -> list[dict[str, Any]]:
    """Trainable parameters for an optimizer: logits, bank and others, each with its learning rate, no weight decay."""
    logits: dict[Tensor, None] = {}
    banks: dict[Tensor, None] = {}
    for module in model.modules():
        if isinstance(module, LogitsAdapter):
            logits.update(dict.fromkeys((module.logits_a, module.logits_b)))
        elif isinstance(module, VectorBank):
            banks[module.vectors] = None
    others = [parameter for parameter in model.parameters() if parameter not in logits and parameter not in banks]
    groups = ((list(logits), logits_lr), (list(banks), bank_lr), (others, other_lr))
    trained = [([parameter for parameter in group if parameter.requires_grad], rate) for group, rate in groups]
    return [{"params": parameters, "lr": rate, "weight_decay": 0.0} for parameters, rate in trained if parameters]


def savable_parameters(checkpoint: AdapterCheckpoint) -> tuple[int, int]:
    """(VB-LoRA's, others') parameters in an adapter's file, in float32 equivalents.

    With N sub-vectors: h·b + N·h in full, h·b + N·(k - 1) + N·k·f for top-k only, where f is the size of an index.
    """
    config = checkpoint.config
    pairs = [
        (module.a.indices, module.b.indices) if isinstance(module, TopKModule) else (module.a, module.b)
        for module in checkpoint.modules.values()
    ]
    sub_vectors = sum(side.shape[0] * side.shape[1] for pair in pairs for side in pair)
    per_sub_vector: float = config.num_vectors
    if config.save_only_topk_weights:
        index_size = stored_index_dtype(config.num_vectors).itemsize / torch.float32.itemsize
        per_sub_vector = config.topk - 1 + config.topk * index_size
    others = sum(tensor.numel() for tensor in checkpoint.extras.values())
    return int(config.num_vectors * config.vector_length + sub_vectors * per_sub_vector), others
