"""Which parameters are trained at which rate, and how many a saved adapter holds. Knows modules, not optimizers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vblora.bank import VectorBank
from vblora.checkpoint import AdapterCheckpoint, stored_index_dtype
from vblora.config import VBLoRAConfig
from vblora.layer import LogitsAdapter
from vblora.mixture import ModuleShape


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


class Counts(NamedTuple):
    """Numbers of parameters. `full` and `topk_only` are what a file of either mode holds, in float32 equivalents."""

    sub_vectors: int
    trainable: int
    full: int
    topk_only: int
    lora: int


def count_parameters(config: VBLoRAConfig, shapes: Collection[ModuleShape]) -> Counts:
    """What an adapter of these modules takes, without the extras, beside a LoRA of the same rank.

    With N = Σ r (in + out) / b sub-vectors: h·b + N·h are trained and held by a full file; one of top-k metadata holds
    h·b + N·(k - 1) + N·k·f, where f is the size of an index in units of a float32.
    """
    h, b, k = config.num_vectors, config.vector_length, config.topk
    lora = sum(config.r * (shape.in_features + shape.out_features) for shape in shapes)
    sub_vectors = lora // b
    index_size = stored_index_dtype(h).itemsize / torch.float32.itemsize
    trainable = h * b + sub_vectors * h
    return Counts(sub_vectors, trainable, trainable, int(h * b + sub_vectors * (k - 1 + k * index_size)), lora)


def savable_parameters(checkpoint: AdapterCheckpoint) -> tuple[int, int]:
    """(VB-LoRA's, others') parameters in an adapter's file, in float32 equivalents."""
    config = checkpoint.config
    counts = count_parameters(config, [module.shape(config.vector_length) for module in checkpoint.modules.values()])
    others = sum(tensor.numel() for tensor in checkpoint.extras.values())
    return counts.topk_only if config.save_only_topk_weights else counts.full, others
