"""P8: seconds to bring a resident adapter into a slot, against vLLM loading the LoRA export of an adapter.

Ours is what the engine reports while it serves requests of adapters that are in no slot yet. vLLM's `file` is
`add_lora` of a LoRA that it did not have before, from a file that the system has cached; `memory` is the same of one
that it keeps in memory and that has lost its slot.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks import sides
from benchmarks.bench_hot_switch import slot_seconds
from benchmarks.peers.beside_vllm import run_vllm, settings
from benchmarks.peers.exports import write_exports

SLOTS = 8


def load_seconds(options: argparse.Namespace) -> sides.Values:
    with tempfile.TemporaryDirectory() as folder:
        exports = write_exports(options.model, Path(folder), options.loads)
        given = settings(SLOTS, SLOTS) | {"max_cpu_loras": options.loads}
        found = run_vllm(exports, given, loads=True)["loads"]
    return {f"vllm_{source}": statistics.median(seconds) for source, seconds in found.items()}


def measure(options: argparse.Namespace, side: str) -> sides.Values:
    return {"slot": slot_seconds(options)} if side == "slot" else load_seconds(options)


def main() -> None:
    parser = sides.arguments(__doc__)
    parser.add_argument("--adapters", type=int, default=256)
    parser.add_argument("--loads", type=int, default=24, help="LoRAs that vLLM loads; the first is its warm-up")
    sides.main("P8", "benchmarks.peers.bench_vllm_hot_switch", parser, measure, ("vllm_file", "slot"), ("slot", "vllm"))


if __name__ == "__main__":
    main()
