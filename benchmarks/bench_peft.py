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
from peft import __version__ as peft_version

from benchmarks.contest import Contest, Run, contest_arguments, own_side
from benchmarks.workload import PROMPT, random_adapter, started_engine
from serving.types import EngineSettings
from vblora.checkpoint import write_adapter
from vblora.integrations.base_models import load_base_model

ADAPTERS = 32


def write_adapters(options: argparse.Namespace, folder: Path) -> list[Path]:
    engine = started_engine(EngineSettings(model=options.model, dtype=options.dtype))
    paths = [folder / f"adapter{seed}" for seed in range(ADAPTERS)]
    for seed, path in enumerate(paths):
        write_adapter(path, random_adapter(engine, seed))
    engine.close()
    return paths


@torch.inference_mode()
def peft(options: argparse.Namespace) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        paths = write_adapters(options, Path(folder))
        base = load_base_model(options.model, dtype=options.dtype)
        model = PeftModel.from_pretrained(base.model, paths[0], paths[0].name)
        for path in paths[1:]:
            model.load_adapter(str(path), path.name)
    tokens = base.tokenizer(PROMPT, return_tensors="pt").input_ids
    answers: list[list[int]] = []
    began = 0.0
    for number, path in enumerate([paths[0], *paths[: options.peft_requests]]):
        if number == 1:  # the first is the warm-up
            began = time.perf_counter()
        model.set_adapter(path.name)
        output = _generate(model, tokens, 2 if number == 0 else options.tokens)
        if number > 0:
            answers.append(output[0, tokens.shape[1] :].tolist())
    return Run(time.perf_counter() - began, tokens[0].tolist(), answers, {"peft": peft_version})


def _generate(model: Any, tokens: torch.Tensor, number: int) -> torch.Tensor:
    output: torch.Tensor = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=number,
        min_new_tokens=number, pad_token_id=0,
    )  # fmt: skip
    return output


def main() -> None:
    parser = contest_arguments(__doc__)
    parser.add_argument("--peft-requests", type=int, default=3)
    sides = {"ours": own_side(ADAPTERS), "peft": peft}
    Contest("P5", "benchmarks.bench_peft", sides, dict.fromkeys(sides, ADAPTERS)).main(parser)


if __name__ == "__main__":
    main()
