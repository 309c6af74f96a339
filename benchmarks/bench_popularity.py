"""P7: throughput of 32 requests by how popular each adapter is: distinct, uniform, zipf, identical, skewed.

The ratio is that of the slowest to the fastest.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks import sides
from benchmarks.workload import cheap_adapters, started_engine, throughput
from serving.types import EngineSettings

ZIPF = 1.5
POPULARITIES = ("distinct", "uniform", "zipf", "identical", "skewed")


def drawn(popularity: str, rows: int) -> list[int]:
    """The adapter of each row, as a number below `rows`."""
    generator = torch.Generator().manual_seed(0)
    if popularity == "distinct":
        return list(range(rows))
    if popularity == "identical":
        return [0] * rows
    if popularity == "skewed":  # half of all rows are one adapter's
        return [0 if row % 2 else row for row in range(rows)]
    shares = torch.ones(rows) if popularity == "uniform" else torch.arange(1, rows + 1).pow(-ZIPF)
    numbers: list[int] = torch.multinomial(shares, rows, replacement=True, generator=generator).tolist()
    return numbers


def measure(options: argparse.Namespace, side: str) -> sides.Values:
    """All in one process, in turn, twice; the better of each, since what they differ by is small."""
    engine = started_engine(EngineSettings(model=options.model, dtype=options.dtype))
    adapters = cheap_adapters(engine, options.rows)
    values: sides.Values = {}
    for _ in range(2):
        for popularity in POPULARITIES:
            rows = [adapters[number] for number in drawn(popularity, options.rows)]
            found = throughput(engine, options.tokens, rows, options.rows)
            values[popularity] = max(found, values.get(popularity, 0.0))
    engine.close()
    found_all = list(values.values())
    return values | {"slowest": min(found_all), "fastest": max(found_all)}


def main() -> None:
    parser = sides.arguments(__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    sides.main("P7", "benchmarks.bench_popularity", parser, measure, ("slowest", "fastest"))


if __name__ == "__main__":
    main()
