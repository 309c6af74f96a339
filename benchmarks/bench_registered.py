"""P6: throughput of uniform traffic over 2,000 resident adapters against the same over 5, own engine."""

from __future__ import annotations

import argparse

from benchmarks import sides
from benchmarks.workload import cheap_adapters, started_engine, throughput
from serving.types import EngineSettings


def measure(options: argparse.Namespace, side: str) -> sides.Values:
    """Requests take the adapters in turn, so that with many each comes once, and has to be composed."""
    engine = started_engine(EngineSettings(model=options.model, dtype=options.dtype))
    adapters = cheap_adapters(engine, options.many if side == "many" else options.few)
    values = {side: throughput(engine, options.tokens, adapters, options.requests)}
    engine.close()
    return values


def main() -> None:
    parser = sides.arguments(__doc__)
    parser.add_argument("--few", type=int, default=5)
    parser.add_argument("--many", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=192)
    parser.add_argument("--tokens", type=int, default=32)
    sides.main("P6", "benchmarks.bench_registered", parser, measure, ("many", "few"), ("many", "few"))


if __name__ == "__main__":
    main()
