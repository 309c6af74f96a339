"""P17: a step of 16 requests whose answers must match a JSON schema against one of requests that answer freely.

Greedy for the ratio, and sampled at temperature 1 beside it: medians of decoding steps, in milliseconds, that all 16
take part in. Then, in milliseconds too: the first check of a structure, which starts the process that compiles; a check
of another, of one known already; and what refusing bad ones takes, those that explode up to the cap of 5 s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from benchmarks import sides
from benchmarks.workload import Recorder, random_adapter, requests, started_engine
from serving.engine import Engine
from serving.errors import InvalidValue
from serving.types import EngineSettings, GenerationRequest, Structure

PEOPLE = {
    "type": "array",
    "minItems": 100,  # so that no answer ends early
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 3, "maxLength": 30},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "likes": {"type": "array", "items": {"enum": ["tea", "coffee", "water"]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "likes"],
        "additionalProperties": False,
    },
}
PRIMES = [{"type": "integer", "multipleOf": prime} for prime in (9973, 9967, 9949, 9941)]
SLOW = {f"p{number}": {"type": "string", "pattern": f"^a{number}b.{{100}}$"} for number in range(5000)}


def schema(value: object) -> Structure:
    return Structure("json_schema", json.dumps(value))


BAD = {
    "unclosed": Structure("regex", "(a"),
    "unsupported": schema({"type": "array", "uniqueItems": True}),
    "nested": Structure("regex", "(" * 30_000 + "a" + ")" * 30_000),
    "memory": schema({"allOf": PRIMES}),
    "time": schema({"type": "object", "properties": SLOW}),
}


def measure(options: argparse.Namespace, side: str) -> sides.Values:
    recorder = Recorder()
    engine = started_engine(EngineSettings(model=options.model, dtype=options.dtype), observer=recorder)
    values: sides.Values = {}
    if side == "structured":
        values |= checks(engine)
    adapters = [engine.load_adapter(random_adapter(engine, seed)) for seed in range(options.rows)]
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        timed = list(answering(engine, options, adapters, side, temperature))
        engine.generate([replace(request, sampling=replace(request.sampling, max_tokens=4)) for request in timed])
        first = len(recorder.steps)
        answers = engine.generate(timed)
        assert all(len(answer.token_ids) == options.tokens for answer in answers), "every request must run to its end"
        steps = [step.seconds for step in recorder.steps[first:] if step.decode_rows == options.rows]
        values[f"{side}_{name}"] = 1000 * statistics.median(steps)
    engine.close()
    return values


def answering(
    engine: Engine, options: argparse.Namespace, adapters: list[str], side: str, temperature: float
) -> Iterator[GenerationRequest]:
    for seed, request in enumerate(requests(engine, options.rows, options.tokens, adapters)):
        structure = schema(PEOPLE) if side == "structured" else None
        sampling = replace(request.sampling, temperature=temperature, seed=seed, structure=structure)
        yield replace(request, sampling=sampling)


def checks(engine: Engine) -> sides.Values:
    grammars = engine.grammars
    values = {"first": milliseconds(engine, Structure("json_object")), "another": milliseconds(engine, schema(PEOPLE))}
    values["known"] = milliseconds(engine, schema(PEOPLE))
    for name, structure in BAD.items():
        values[f"refuse_{name}"] = milliseconds(engine, structure)
        grammars.check(schema({"const": name}), "structure")
    return values


def milliseconds(engine: Engine, structure: Structure) -> float:
    began = time.perf_counter()
    with suppress(InvalidValue):
        engine.grammars.check(structure, "structure")
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    parser = sides.arguments(__doc__, repeats=2)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    ratio = ("structured_greedy", "plain_greedy")
    sides.main("P17", "benchmarks.bench_structures", parser, measure, ratio, ("plain", "structured"))


if __name__ == "__main__":
    main()
