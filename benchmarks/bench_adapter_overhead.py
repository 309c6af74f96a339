"""P4: throughput of 32 requests on 32 distinct adapters against the same requests on the base alone, own engine.

Every figure comes from a fresh process, both sides in turn. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from benchmarks.workload import fresh_process, machine, random_adapter, requests
from serving.engine import Engine
from serving.types import EngineSettings


def measure(model: str, rows: int, tokens: int, adapters: int) -> dict[str, object]:
    """Tokens per second of whole requests, prefill included, after one short warm-up."""
    engine = Engine.from_settings(EngineSettings(model=model))
    loaded = [engine.load_adapter(random_adapter(engine, seed)) for seed in range(adapters)]
    engine.generate(requests(engine, rows, 2, loaded))
    began = time.perf_counter()
    answers = engine.generate(requests(engine, rows, tokens, loaded))
    seconds = time.perf_counter() - began
    generated = sum(len(answer.token_ids) for answer in answers)
    assert generated == rows * tokens, "every request must generate all its tokens"
    result = {"tokens_per_second": generated / seconds, "dtype": str(engine.runner.model.dtype), **machine()}
    engine.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(measure(options.model, options.rows, options.tokens, options.child)))
        return
    sides: dict[str, list[float]] = {"adapters": [], "base": []}
    details: dict[str, Any] = {}
    for repeat in range(options.repeats):
        for side, adapters in (("adapters", options.rows), ("base", 0)):
            details = fresh_process(
                "benchmarks.bench_adapter_overhead",
                "--child", adapters, "--model", options.model, "--rows", options.rows, "--tokens", options.tokens,
            )  # fmt: skip
            sides[side].append(details.pop("tokens_per_second"))
            print(f"{repeat + 1}/{options.repeats} {side}: {sides[side][-1]:.1f} tok/s", flush=True)
    medians = {side: statistics.median(values) for side, values in sides.items()}
    print(json.dumps({"claim": "P4", "ratio": medians["adapters"] / medians["base"], "sides": sides, **details}))


if __name__ == "__main__":
    main()
