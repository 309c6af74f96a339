"""Seconds to the first token of a tenant, 95th percentile: beside one that sends 50 times as many requests, and alone.

The tenant sends the same requests at the same random moments on both sides, less than its half of what the machine can
do. The other tenant's are alike; what its queue has no room for is refused. Answers have up to twice `--tokens` tokens.
Wanted is less than 2.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time

from benchmarks import sides
from benchmarks.workload import random_adapter, started_engine
from serving.engine import Engine
from serving.errors import RateLimitExceeded
from serving.types import EngineSettings, GenerationRequest, SamplingParams

TIMES_THE_LOAD = 50


class Tenant:
    """Sends requests at random moments, on average `rate` a second, and notes what became of them."""

    def __init__(self, engine: Engine, name: str, adapter: str, rate: float, options: argparse.Namespace) -> None:
        self.first_tokens: list[float] = []
        self.refused = 0
        self._engine, self._name, self._adapter, self._rate = engine, name, adapter, rate
        self._options = options
        self._random = random.Random(name)

    async def send(self, seconds: float) -> None:
        """Send for so long, then wait for the last answer."""
        began = due = time.perf_counter()
        number = 0
        async with asyncio.TaskGroup() as answers:
            while (due := due + self._random.expovariate(self._rate)) < began + seconds:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                request, number = self._request(number), number + 1
                answers.create_task(self._answer(request, due))

    async def _answer(self, request: GenerationRequest, due: float) -> None:
        try:
            stream = self._engine.submit(request)
        except RateLimitExceeded:
            self.refused += 1
            return
        waiting = True
        async for event in stream:
            if waiting:
                self.first_tokens.append(time.perf_counter() - due)
                waiting = False
            assert event.finish_reason != "error", event.error

    def _request(self, number: int) -> GenerationRequest:
        prompt = tuple(self._random.choices(range(3, self._engine.card.vocab_size), k=self._options.length))
        sampling = SamplingParams(
            max_tokens=self._random.randint(1, 2 * self._options.tokens), temperature=0, ignore_eos=True
        )
        return GenerationRequest(f"{self._name}{number}", self._name, prompt, sampling, self._adapter)


async def load(engine: Engine, options: argparse.Namespace, adapters: list[str], side: str) -> sides.Values:
    small = Tenant(engine, "small", adapters[0], options.rate, options)
    large = Tenant(engine, "large", adapters[1], options.rate * TIMES_THE_LOAD, options)
    await small.send(2.0)  # until every shape of a step has been met
    small.first_tokens.clear()
    if side == "alone":
        await small.send(options.seconds)
    else:
        flood = asyncio.create_task(large.send(2 * options.seconds))
        await asyncio.sleep(3.0)  # the large tenant's queue is full
        await small.send(options.seconds)
        flood.cancel()
        await asyncio.wait([flood])
    assert not small.refused
    p95 = statistics.quantiles(small.first_tokens, n=20)[-1]
    median = statistics.median(small.first_tokens)
    return {side: p95, f"{side}_median": median, f"{side}_answers": len(small.first_tokens)}


def measure(options: argparse.Namespace, side: str) -> sides.Values:
    engine = started_engine(EngineSettings(model=options.model, dtype=options.dtype))
    adapters = [engine.load_adapter(random_adapter(engine, seed)) for seed in range(2)]
    found = asyncio.run(load(engine, options, adapters, side))
    engine.close()
    return found


def main() -> None:
    parser = sides.arguments(__doc__)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second of the small tenant")
    parser.add_argument("--length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer, on average")
    parser.add_argument("--seconds", type=float, default=60.0)
    sides.main("fairness", "benchmarks.bench_fairness", parser, measure, ("beside", "alone"), ("beside", "alone"))


if __name__ == "__main__":
    main()
