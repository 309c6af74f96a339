"""P14: time to the first token of a prompt of 512 tokens that the cache holds, against one that it does not.

One request at a time, with an adapter, both sides in turn on every prompt, in fresh processes. Before the times an
engine in float32 gives the same tokens both ways; bfloat16 rounds differently when other rows are in a product. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch

from benchmarks.sides import fresh_process
from benchmarks.workload import machine, random_adapter, started_engine
from serving.engine import Engine
from serving.types import EngineSettings, GenerationRequest, SamplingParams

NEW_TOKENS = 16
SIDES = ("cold", "cached")


def prompts(engine: Engine, count: int, length: int) -> list[tuple[int, ...]]:
    """Random prompts that begin differently."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, engine.card.vocab_size, (count, length), generator=generator)
    return [tuple(row) for row in tokens.tolist()]


def answer(engine: Engine, name: str, prompt: tuple[int, ...], revision: str) -> tuple[float, int, list[int]]:
    """Seconds to the first token, tokens that were cached, and the tokens of a greedy answer."""
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    first, cached = 0.0, 0
    tokens: list[int] = []
    began = time.perf_counter()
    for event in engine.stream(GenerationRequest(name, "default", prompt, sampling, revision)):
        first = first or time.perf_counter() - began
        tokens += event.token_ids
        cached += event.cached_tokens
    return first, cached, tokens


def measure(model: str, dtype: str, length: int, count: int) -> dict[str, object]:
    """Both sides for `count` prompts, after one that is not counted."""
    engine = started_engine(EngineSettings(model=model, dtype=dtype))
    revision = engine.load_adapter(random_adapter(engine, 0))
    rows = [
        [answer(engine, f"{side}-{number}", prompt, revision) for side in SIDES]
        for number, prompt in enumerate(prompts(engine, count + 1, length))
    ]
    engine.close()
    for (_, nothing, expected), (_, found, tokens) in rows:
        if nothing or found < length - engine.settings.block_size:
            sys.exit(f"{found} tokens were cached, and {nothing} of a prompt that is new")
        if dtype == "float32" and tokens != expected:
            sys.exit(f"with {found} tokens cached the answer is {tokens}, with none it was {expected}")
    sides = {side: [row[index][0] for row in rows[1:]] for index, side in enumerate(SIDES)}
    return {"sides": sides, "dtype": str(engine.runner.model.dtype), **machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--prompts", type=int, default=3, help="prompts a process")
    parser.add_argument("--repeats", type=int, default=3, help="processes")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.model, options.dtype, options.length, options.prompts)))
        return

    def fresh(dtype: str, count: int) -> dict[str, Any]:
        shape = ("--model", options.model, "--length", options.length, "--prompts", count, "--dtype", dtype)
        return fresh_process("benchmarks.bench_prefix_cache", "--child", *shape)

    fresh("float32", 1)
    sides: dict[str, list[float]] = {side: [] for side in SIDES}
    details: dict[str, Any] = {}
    for repeat in range(options.repeats):
        details = fresh(options.dtype, options.prompts)
        for side, seconds in details.pop("sides").items():
            sides[side].append(statistics.median(seconds))
        print(f"{repeat + 1}/{options.repeats}: " + ", ".join(f"{s[-1]:.4f} s {side}" for side, s in sides.items()))
    ratio = statistics.median(sides["cold"]) / statistics.median(sides["cached"])
    print(json.dumps({"claim": "P14", "ratio": ratio, "sides": sides, **details}))


if __name__ == "__main__":
    main()
