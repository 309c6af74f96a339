"""P11: a decode step of one row with an adapter, against reading all weights once at this machine's bandwidth.

The bandwidth is that of a sum over half a GiB, by torch on all its cores. The weights are those of the linear layers,
output layer included; of the embedding a step reads one row.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks import sides
from benchmarks.workload import Recorder, random_adapter, requests, started_engine
from serving.engine.compute import ComputeThread
from serving.types import EngineSettings
from vblora.compact import linear_shape
from vblora.integrations.base_models import load_base_model

BYTES = 1 << 29


def bandwidth() -> float:
    """Bytes a second."""
    memory = torch.ones(BYTES // 4)
    times = []
    for _ in range(9):
        began = time.perf_counter()
        memory.sum()
        times.append(time.perf_counter() - began)
    return BYTES / statistics.median(times)


def weight_bytes(options: argparse.Namespace) -> int:
    model = load_base_model(options.model, dtype=options.dtype).model
    return sum(module.get_parameter("weight").nbytes for module in model.modules() if linear_shape(module))


def measure(options: argparse.Namespace, side: str) -> sides.Values:
    compute = ComputeThread("bandwidth")
    reading = compute.call(lambda: weight_bytes(options)) / compute.call(bandwidth)
    compute.stop()
    recorder = Recorder()
    engine = started_engine(EngineSettings(model=options.model, dtype=options.dtype), observer=recorder)
    adapters = [engine.load_adapter(random_adapter(engine, 0))]
    engine.generate(requests(engine, 1, 8, adapters))
    recorder.steps.clear()
    engine.generate(requests(engine, 1, options.tokens, adapters))
    engine.close()
    return {"step": statistics.median(step.seconds for step in recorder.steps), "reading": reading}


def main() -> None:
    parser = sides.arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    sides.main("P11", "benchmarks.bench_weight_reading", parser, measure, ("step", "reading"))


if __name__ == "__main__":
    main()
