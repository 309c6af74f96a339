"""Workload W: the demo base, 64 new tokens, random adapters of r 4, h 256, b 128, k 2 on every linear layer."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

import torch

from serving.engine import Engine
from serving.types import GenerationRequest, SamplingParams
from vblora import VBLoRAConfig
from vblora.checkpoint import AdapterCheckpoint, TopKModule
from vblora.mixture import topk_mixture

PROMPT = "The restaurant on the corner of the market square"
RANK, NUM_VECTORS, VECTOR_LENGTH, TOPK = 4, 256, 128, 2


def random_adapter(engine: Engine, seed: int) -> AdapterCheckpoint:
    """An adapter of workload W with random content."""
    generator = torch.Generator().manual_seed(seed)
    bank = (torch.rand(NUM_VECTORS, VECTOR_LENGTH, generator=generator) - 0.5) * 0.04

    def logits(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, NUM_VECTORS, generator=generator)

    modules = {
        name: TopKModule(
            topk_mixture(logits(RANK, shape.in_features // VECTOR_LENGTH), TOPK),
            topk_mixture(logits(shape.out_features // VECTOR_LENGTH, RANK), TOPK),
        )
        for name, shape in engine.layout.modules.items()
    }
    config = VBLoRAConfig(
        r=RANK, num_vectors=NUM_VECTORS, vector_length=VECTOR_LENGTH, topk=TOPK, save_only_topk_weights=True,
        target_modules=sorted({name.rpartition(".")[2] for name in modules}),
    )  # fmt: skip
    return AdapterCheckpoint(config=config, bank=bank, modules=modules, extras={}).topk()


def requests(engine: Engine, count: int, tokens: int, adapters: list[str]) -> list[GenerationRequest]:
    """`count` requests, all at once; row i uses adapter i modulo their number, or the base if there are none."""
    prompt = tuple(engine.codec.encode(PROMPT))
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    return [
        GenerationRequest(f"r{row}", "default", prompt, sampling, adapters[row % len(adapters)] if adapters else None)
        for row in range(count)
    ]


def fresh_process(module: str, *arguments: object) -> dict[str, Any]:
    """The JSON of the last line that a benchmark prints, run in a process of its own."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
