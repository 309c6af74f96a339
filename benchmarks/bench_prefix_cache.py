"""P14: time to the first token of a prompt of 512 tokens that the cache holds, against one that it does not.

One engine, one request at a time, own adapter; both sides in turn, with prompts of their own for every cold one. Before
the times an engine in float32 gives the same tokens both ways (bfloat16 rounds differently when other rows are in the
product). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch

from benchmarks.workload import machine, random_adapter
from serving.engine import Engine
from serving.types import EngineSettings, GenerationRequest, SamplingParams

NEW_TOKENS = 16


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


def compare_answers(model: str, length: int) -> None:
    """Exit unless a cached prompt is answered as an uncached one, in float32."""
    engine = Engine.from_settings(EngineSettings(model=model, dtype="float32"))
    revision = engine.load_adapter(random_adapter(engine, 0))
    (prompt,) = prompts(engine, 1, length)
    (_, nothing, expected), (_, found, tokens) = (answer(engine, name, prompt, revision) for name in ("a", "b"))
    engine.close()
    if tokens != expected or nothing or found < length - engine.settings.block_size:
        sys.exit(f"with {found} tokens cached the answer is {tokens}, with {nothing} it was {expected}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    compare_answers(options.model, options.length)
    engine = Engine.from_settings(EngineSettings(model=options.model))
    revision = engine.load_adapter(random_adapter(engine, 0))
    sides: dict[str, list[float]] = {"cold": [], "cached": []}
    warm_up, *measured = prompts(engine, options.repeats + 1, options.length)
    answer(engine, "warm-up", warm_up, revision)
    for number, prompt in enumerate(measured):
        cold, _, _ = answer(engine, f"cold-{number}", prompt, revision)
        cached, found, _ = answer(engine, f"cached-{number}", prompt, revision)
        sides["cold"].append(cold)
        sides["cached"].append(cached)
        print(f"{number + 1}/{options.repeats}: {cold:.4f} s cold, {cached:.4f} s cached ({found} tokens)", flush=True)
    engine.close()
    ratio = statistics.median(sides["cold"]) / statistics.median(sides["cached"])
    dtype = str(engine.runner.model.dtype)
    print(json.dumps({"claim": "P14", "target": ">= 5", "ratio": ratio, "sides": sides, "dtype": dtype, **machine()}))


if __name__ == "__main__":
    main()
