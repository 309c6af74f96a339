"""P4: throughput of 32 requests on 32 distinct adapters against the same requests on the base alone, own engine."""

from __future__ import annotations

import argparse

from benchmarks import sides
from benchmarks.workload import random_adapter, throughput
from serving.engine import Engine
from serving.types import EngineSettings


def measure(options: argparse.Namespace, side: str) -> sides.Values:
    engine = Engine.from_settings(EngineSettings(model=options.model, dtype=options.dtype))
    count = options.rows if side == "adapters" else 0
    adapters = [engine.load_adapter(random_adapter(engine, seed)) for seed in range(count)]
    values = {side: throughput(engine, options.tokens, adapters, options.rows)}
    engine.close()
    return values


def main() -> None:
    parser = sides.arguments(__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    sides.main("P4", "benchmarks.bench_adapter_overhead", parser, measure, ("adapters", "base"), ("adapters", "base"))


if __name__ == "__main__":
    main()
