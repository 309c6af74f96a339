"""P9: bytes of a resident adapter against those of a LoRA of the same rank in bfloat16, and of 10,000 in the process.

The ratio is for adapters that share a bank. `own_bank` counts a bank for each adapter too; `growth` is what the
process grew by in resident memory while the adapters came.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks import sides
from benchmarks.workload import RANK, cheap_adapters, started_engine
from serving.types import EngineSettings

BYTES_OF_BFLOAT16 = 2


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(options: argparse.Namespace, side: str) -> sides.Values:
    engine = started_engine(EngineSettings(model=options.model, dtype=options.dtype))
    cheap_adapters(engine, 1)
    first, before = engine.residency.stats(), resident_bytes()
    cheap_adapters(engine, options.adapters)
    growth, stats = resident_bytes() - before, engine.residency.stats()
    shapes = engine.layout.modules.values()
    engine.close()
    return {
        "lora": BYTES_OF_BFLOAT16 * RANK * sum(shape.in_features + shape.out_features for shape in shapes),
        "shared_bank": (stats.bytes - first.bytes) / (stats.adapters - first.adapters),
        "own_bank": first.bytes + first.bank_bytes,
        "adapters": stats.adapters,
        "growth": growth,
    }


def main() -> None:
    parser = sides.arguments(__doc__, repeats=1)
    parser.add_argument("--adapters", type=int, default=10_000)
    sides.main("P9", "benchmarks.bench_memory", parser, measure, ("lora", "shared_bank"))


if __name__ == "__main__":
    main()
