"""P13: steps to the first token of a short request while long prompts are read, against the same on an idle engine.

The ratio is of steps; a step that has begun when the request comes counts. Seconds are given beside them.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time

import torch

from benchmarks import sides
from benchmarks.workload import Recorder, random_adapter, requests, started_engine
from serving.engine import Engine
from serving.types import EngineSettings, GenerationRequest, SamplingParams


def long_prompts(engine: Engine, options: argparse.Namespace, number: int, revision: str) -> list[GenerationRequest]:
    """Prompts that no try before has left in the cache."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(3, engine.card.vocab_size, (options.prompts, options.length), generator=generator)
    sampling = SamplingParams(max_tokens=1, temperature=0)
    return [
        GenerationRequest(f"long-{number}-{row}", "default", tuple(prompt), sampling, revision)
        for row, prompt in enumerate(tokens.tolist())
    ]


def measure(options: argparse.Namespace, side: str) -> sides.Values:
    recorder = Recorder()
    engine = started_engine(EngineSettings(model=options.model, dtype=options.dtype), observer=recorder)
    adapters = [engine.load_adapter(random_adapter(engine, seed)) for seed in range(2)]
    engine.generate(requests(engine, 1, 2, adapters[:1]))
    steps: list[int] = []
    seconds: list[float] = []
    for number in range(options.tries):
        long = long_prompts(engine, options, number, adapters[1])
        reading = threading.Thread(target=engine.generate, args=(long,))
        if side == "busy":
            reading.start()
            seen = len(recorder.steps)
            while len(recorder.steps) < seen + 2:
                time.sleep(0.001)
        first, began = len(recorder.steps), time.perf_counter()
        for number_of_event, _ in enumerate(engine.stream(requests(engine, 1, 2, adapters[:1])[0])):
            if number_of_event == 0:
                seconds.append(time.perf_counter() - began)
                time.sleep(0.001)  # a step is reported right after its tokens
                steps.append(len(recorder.steps) - first)
        if side == "busy":
            assert reading.is_alive(), "the long prompts were read before the short request was answered"
            reading.join()
    engine.close()
    return {side: statistics.median(steps), f"{side}_seconds": statistics.median(seconds)}


def main() -> None:
    parser = sides.arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=4, help="long prompts")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each")
    parser.add_argument("--tries", type=int, default=5)
    sides.main("P13", "benchmarks.bench_chunked_prefill", parser, measure, ("busy", "idle"), ("busy", "idle"))


if __name__ == "__main__":
    main()
