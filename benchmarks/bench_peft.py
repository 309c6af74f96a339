"""P5: throughput of 32 requests on 32 adapters, against PEFT answering them in turn: set_adapter, then generate.

PEFT has the same VB-LoRA adapters, all loaded, with their banks in memory once each. Its side is slow and steady: it
answers `--peft-requests` of the requests, which take as long each. bfloat16 on both sides.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from benchmarks import sides
from benchmarks.workload import PROMPT, random_adapter, throughput
from serving.engine import Engine
from serving.types import EngineSettings
from vblora.checkpoint import write_adapter
from vblora.integrations.base_models import load_base_model


def ours(options: argparse.Namespace) -> float:
    engine = Engine.from_settings(EngineSettings(model=options.model, dtype=options.dtype))
    adapters = [engine.load_adapter(random_adapter(engine, seed)) for seed in range(options.rows)]
    found = throughput(engine, options.tokens, adapters, options.rows)
    engine.close()
    return found


def write_adapters(options: argparse.Namespace, folder: Path) -> list[Path]:
    engine = Engine.from_settings(EngineSettings(model=options.model, dtype=options.dtype))
    paths = [folder / f"adapter{seed}" for seed in range(options.rows)]
    for seed, path in enumerate(paths):
        write_adapter(path, random_adapter(engine, seed))
    engine.close()
    return paths


@torch.inference_mode()
def peft(options: argparse.Namespace) -> float:
    with tempfile.TemporaryDirectory() as folder:
        paths = write_adapters(options, Path(folder))
        base = load_base_model(options.model, dtype=options.dtype)
        model = PeftModel.from_pretrained(base.model, paths[0], paths[0].name)
        for path in paths[1:]:
            model.load_adapter(str(path), path.name)
    tokens = base.tokenizer(PROMPT, return_tensors="pt").input_ids
    answered = 0
    began = 0.0
    for number, path in enumerate([paths[0], *paths[: options.peft_requests]]):
        if number == 1:  # the first is the warm-up
            began = time.perf_counter()
        model.set_adapter(path.name)
        output = _generate(model, tokens, 2 if number == 0 else options.tokens)
        answered += 0 if number == 0 else output.shape[1] - tokens.shape[1]
    assert answered == options.peft_requests * options.tokens
    return answered / (time.perf_counter() - began)


def _generate(model: Any, tokens: torch.Tensor, number: int) -> torch.Tensor:
    output: torch.Tensor = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=number,
        min_new_tokens=number, pad_token_id=0,
    )  # fmt: skip
    return output


def measure(options: argparse.Namespace, side: str) -> sides.Values:
    return {side: ours(options) if side == "ours" else peft(options)}


def main() -> None:
    parser = sides.arguments(__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--peft-requests", type=int, default=3)
    sides.main("P5", "benchmarks.bench_peft", parser, measure, ("ours", "peft"), ("ours", "peft"))


if __name__ == "__main__":
    main()
