"""Minutes of mixed load on the engine: no error, flat memory, and steps of one kind that take about the same time.

Clients ask one after another, each for an adapter drawn by zipf 1.2 from 1,000 resident ones, with a prompt of 10 to
1,500 tokens (evenly in the logarithm) and an answer of 1 to 64. A bucket is the steps whose decode rows, prefill tokens
and context tokens lie between the same powers of two. The exit status is 1 if a request failed, if the process is
more than 2 % larger at the end than when a quarter of the time had passed, or if in a bucket of 100 steps or more the
99th percentile is over three times the median. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable

from benchmarks.bench_memory import resident_bytes
from benchmarks.workload import Recorder, cheap_adapters, machine, started_engine
from serving.engine import Engine
from serving.types import EngineSettings, GenerationRequest, SamplingParams, StepReport

ZIPF = 1.2
SHORTEST, LONGEST, MOST_NEW = 10, 1500, 64
GROWTH, SPREAD, FEWEST = 1.02, 3.0, 100
CACHE_BYTES = 1 << 29  # too small for all clients at once, and soon written to throughout


class Load:
    """Clients of one engine, until a moment in time."""

    def __init__(self, engine: Engine, adapters: list[str], end: float) -> None:
        self.engine, self.adapters, self.end = engine, adapters, end
        self.shares = [(rank + 1) ** -ZIPF for rank in range(len(adapters))]
        self.finished: Counter[str] = Counter()
        self.tokens = 0

    async def client(self, number: int) -> None:
        draw = random.Random(number)
        count = 0
        while time.monotonic() < self.end:
            count += 1
            length = round(SHORTEST * (LONGEST / SHORTEST) ** draw.random())
            prompt = tuple(draw.randrange(3, self.engine.card.vocab_size) for _ in range(length))
            revision = draw.choices(self.adapters, self.shares)[0]
            sampling = SamplingParams(max_tokens=draw.randint(1, MOST_NEW), temperature=draw.choice((0.0, 0.8)))
            request = GenerationRequest(f"{number}-{count}", f"tenant{number % 8}", prompt, sampling, revision)
            async for event in self.engine.submit(request):
                self.tokens += len(event.token_ids)
                if event.finish_reason:
                    self.finished[event.finish_reason] += 1


async def run(load: Load, clients: int, minutes: float) -> list[int]:
    """All clients to their end; returns the process's bytes, looked at every second after a quarter of the time."""
    sizes: list[int] = []

    async def watch() -> None:
        await asyncio.sleep(15 * minutes)
        while True:
            sizes.append(resident_bytes())
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(load.client(number) for number in range(clients)))
    watching.cancel()
    return sizes


def bucket(step: StepReport) -> tuple[int, int, int]:
    return step.decode_rows.bit_length(), step.prefill_tokens.bit_length(), step.context_tokens.bit_length()


def spreads(steps: Iterable[StepReport]) -> dict[str, list[float]]:
    """For each bucket with enough steps: how many, their median in seconds, and their 99th percentile over it."""
    buckets: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    for step in steps:
        buckets[bucket(step)].append(step.seconds)
    found = {}
    for key, seconds in sorted(buckets.items()):
        if len(seconds) >= FEWEST:
            median = statistics.median(seconds)
            found["-".join(map(str, key))] = [len(seconds), median, statistics.quantiles(seconds, n=100)[98] / median]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--adapters", type=int, default=1000)
    options = parser.parse_args()
    recorder = Recorder()
    settings = EngineSettings(model=options.model, kv_cache_bytes=CACHE_BYTES)
    engine = started_engine(settings, observer=recorder)
    adapters = cheap_adapters(engine, options.adapters)
    load = Load(engine, adapters, time.monotonic() + 60 * options.minutes)
    sizes = asyncio.run(run(load, options.clients, options.minutes))
    preemptions = engine.stats().preemptions
    engine.close()
    found = spreads(recorder.steps)
    for name, (count, median, spread) in found.items():
        print(f"bucket {name}: {count} steps, median {median * 1e3:.1f} ms, p99 {spread:.2f} times that")
    faults = []
    if set(load.finished) - {"stop", "length"}:
        faults.append(f"requests ended with {dict(load.finished)}")
    if sizes[-1] > GROWTH * sizes[0]:
        faults.append(f"the process grew from {sizes[0]:,} to {sizes[-1]:,} bytes")
    faults += [f"bucket {name}: p99 is {row[2]:.2f} times the median" for name, row in found.items() if row[2] > SPREAD]
    for fault in faults:
        print(f"not good enough: {fault}", file=sys.stderr)
    result = {
        "soak": "mixed load",
        "minutes": options.minutes,
        "requests": dict(load.finished),
        "tokens": load.tokens,
        "preemptions": preemptions,
        "steps": len(recorder.steps),
        "bytes": [sizes[0], sizes[-1]],
        "worst_spread": max((row[2] for row in found.values()), default=None),
    }
    print(json.dumps(result | machine()))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
