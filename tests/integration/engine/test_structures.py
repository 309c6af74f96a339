"""Answers that must match a structure: what is refused, how fast, and what a random model makes of what is not."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest

from serving.engine import Engine
from serving.engine.grammar import MAX_MESSAGE, Grammars
from serving.engine.grammar_process import PROGRAM
from serving.engine.streams import Generation
from serving.engine.structures import MAX_TEXT
from serving.engine.vocabulary import Vocabulary
from serving.errors import InvalidValue
from serving.types import EngineSettings, GenerationRequest, SamplingParams, Structure
from tests.json_schemas import random_schema
from tests.support import VOCAB_SIZE, tiny_model, tiny_tokenizer
from vblora.integrations.base_models import BaseModel

ROOT = Path(__file__).parents[3]
CAP = 1.0  # seconds to compile, in these tests
SLACK = 3.0  # more, for a busy machine
GOOD = Structure("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}}')
TOKENS = 512


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    grammars = Grammars(Vocabulary(tiny_tokenizer(), VOCAB_SIZE, frozenset({1})), seconds=CAP)
    grammars.check(Structure("regex", "the worker is up"), "regex")
    yield grammars
    grammars.close()


def schema(value: object) -> Structure:
    return Structure("json_schema", json.dumps(value))


def many_properties(number: int) -> Structure:
    return schema({"type": "object", "properties": {f"p{index}": {} for index in range(number)}})


def tools(parameters: object) -> Structure:
    wanted = {"required": True, "parallel": False, "answer": None}
    return Structure("tools", json.dumps({"tools": [{"name": "f", "parameters": parameters}], **wanted}))


DOUBLING = "\n".join(f'r{number}: r{number + 1} r{number + 1} | "x"' for number in range(5000))
PRIMES = [{"type": "integer", "multipleOf": prime} for prime in (9973, 9967, 9949, 9941)]
INTERSECTION = [{"type": "string", "pattern": f"(.*a.{{{number}}}b.*)"} for number in range(20, 50)]
CROSS: list[object] = [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(10)]} for i in range(10)]
SLOW = {f"p{number}": {"type": "string", "pattern": f"^a{number}b.{{100}}$"} for number in range(8000)}

BAD = {
    "regex: unclosed group": (Structure("regex", "(a"), "unclosed group"),
    "regex: backreference": (Structure("regex", r"(a)\1"), "backreferences are not supported"),
    "regex: look-ahead": (Structure("regex", "(?=a)b"), "look-around"),
    "regex: nested deeply": (Structure("regex", "(" * 30_000 + "a" + ")" * 30_000), "nest"),
    "regex: nothing matches": (Structure("regex", "[a&&b]"), "nothing can match it"),
    "regex: too long": (Structure("regex", "a" * (MAX_TEXT + 1)), "at most"),
    "JSON: cut off": (Structure("json_schema", '{"type": '), "line 1"),
    "JSON: no object": (Structure("json_schema", "[1]"), "must be an object"),
    "JSON: nested deeply": (Structure("json_schema", '{"items":' * 30_000 + "{}" + "}" * 30_000), "nested"),
    "schema: unknown type": (schema({"type": "text"}), "text"),
    "schema: unsupported": (schema({"type": "array", "uniqueItems": True, "contains": {}}), "uniqueItems"),
    "schema: contradiction": (schema({"type": "integer", "minimum": 5, "maximum": 3}), "Unsatisfiable"),
    "schema: false": (schema({"type": "object", "properties": {"a": False}, "required": ["a"]}), "Unsatisfiable"),
    "schema: recursion without end": (schema({"$ref": "#"}), "nothing can match it"),
    "schema: elsewhere": (schema({"$ref": "http://127.0.0.1/schema"}), ""),
    "schema: exploding product": (schema({"allOf": CROSS}), ""),
    "schema: exploding integer": (schema({"allOf": PRIMES}), "too"),
    "schema: exploding string": (schema({"allOf": INTERSECTION}), "too"),
    "schema: slow": (schema({"type": "object", "properties": SLOW}), "takes too long"),
    "schema: many values": (schema({"enum": [f"value {number}" for number in range(100_000)]}), "at most"),
    "schema: many properties": (many_properties(700), "items"),
    "choice: empty": (Structure("choice", "[]"), "not an empty one"),
    "choice: no strings": (Structure("choice", "[1]"), "list of strings"),
    "grammar: unknown rule": (Structure("grammar", "start: foo"), 'line 1, column 8: unknown name: "foo"'),
    "grammar: nested deeply": (Structure("grammar", "start: " + "(" * 30_000 + '"a"' + ")" * 30_000), "nested"),
    "grammar: GBNF nested deeply": (Structure("grammar", "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000), "nested"),
    "grammar: doubling": (Structure("grammar", f'start: r0\n{DOUBLING}\nr5000: "z"'), "too"),
    "grammar: without end": (Structure("grammar", "start: start"), "nothing can match it"),
    "tools: no object": (tools({"type": "string"}), "schema of an object"),
    "tools: unsupported": (tools({"type": "object", "dependentRequired": {"a": ["b"]}}), "dependentRequired"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_compiled_is_refused_in_time(grammars: Grammars, name: str) -> None:
    structure, wanted = BAD[name]
    began = time.monotonic()
    with pytest.raises(InvalidValue) as refusal:
        grammars.check(structure, "the.param")
    assert time.monotonic() - began < CAP + SLACK
    message = refusal.value.message
    assert refusal.value.param == "the.param" and wanted in message
    assert len(message) <= MAX_MESSAGE + 100 and message.isprintable()
    assert str(ROOT) not in message and ".rs" not in message

    began = time.monotonic()
    grammars.check(schema({"const": name}), "good")
    assert time.monotonic() - began < SLACK


@pytest.mark.parametrize(
    "structure",
    [
        Structure("regex", "(a|b){100000}"),
        Structure("regex", "a{1,1000000}"),
        schema({"type": "array", "minItems": 1_000_000, "items": {"type": "integer"}}),
        schema({"enum": [f"value {number}" for number in range(20_000)]}),
        Structure("choice", json.dumps([f"choice {number}" for number in range(1024)])),
    ],
)
def test_what_is_large_but_harmless_is_taken(grammars: Grammars, structure: Structure) -> None:
    grammars.check(structure, "param")
    assert grammars.matcher(structure).error is None


def test_memory_is_bounded_too() -> None:
    grammars = Grammars(Vocabulary(tiny_tokenizer(), VOCAB_SIZE, frozenset({1})), seconds=20.0, memory=16 << 20)
    with closing(grammars):
        with pytest.raises(InvalidValue, match="too much memory"):
            grammars.check(schema({"allOf": PRIMES}), "param")
        grammars.check(GOOD, "param")


def test_what_was_checked_is_not_compiled_again(grammars: Grammars) -> None:
    large = schema({"enum": [f"other {number}" for number in range(20_000)]})
    grammars.check(large, "param")
    began = time.monotonic()
    for _ in range(100):
        grammars.check(large, "param")
        grammars.matcher(large)
    assert time.monotonic() - began < 0.5


def test_a_worker_that_is_killed_is_started_again(grammars: Grammars) -> None:
    [worker] = workers(os.getpid())
    os.kill(worker, signal.SIGKILL)
    grammars.check(schema({"const": "after the kill"}), "param")
    assert workers(os.getpid()) != [worker]


def test_a_worker_that_hangs_is_killed(grammars: Grammars) -> None:
    """Seen to fail where `GrammarProcess` does not kill a worker that is silent."""
    [worker] = workers(os.getpid())
    os.kill(worker, signal.SIGSTOP)
    with pytest.raises(InvalidValue, match="cannot be compiled"):
        grammars.check(schema({"const": "while it hangs"}), "param")
    grammars.check(schema({"const": "while it hangs"}), "param")


def test_checks_of_many_threads_all_get_their_own_answer(grammars: Grammars) -> None:
    wrong: list[int] = []

    def check(number: int) -> None:
        structure = Structure("regex", f"a{{{number}}}" if number % 2 else f"({number}")
        try:
            grammars.check(structure, "param")
            refused = False
        except InvalidValue:
            refused = True
        if refused == bool(number % 2):
            wrong.append(number)

    threads = [threading.Thread(target=check, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_worker_ends_with_the_server() -> None:
    code = (
        "from tests.support import tiny_tokenizer\n"
        "from serving.engine.grammar import Grammars\n"
        "from serving.engine.vocabulary import Vocabulary\n"
        "from serving.types import Structure\n"
        "grammars = Grammars(Vocabulary(tiny_tokenizer(), 300, frozenset({1})))\n"
        "grammars.check(Structure('regex', 'a'), 'regex')\n"
        "print('ready', flush=True); input()"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with server:
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        [worker] = workers(server.pid)
        server.kill()
    deadline = time.monotonic() + 10
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)


def test_the_worker_imports_little() -> None:
    code = f"import runpy, sys; runpy.run_path({str(PROGRAM)!r}); print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert "llguidance" in modules and not {"torch", "transformers", "numpy", "serving"} & set(modules)


def workers(parent: int) -> list[int]:
    """The processes that run the worker's program and are children of `parent`."""
    listing = subprocess.run(["ps", "-wweo", "pid=,ppid=,args="], check=True, capture_output=True, text=True).stdout
    rows = [line.split(maxsplit=2) for line in listing.splitlines()]
    return [int(pid) for pid, ppid, command in rows if int(ppid) == parent and PROGRAM.name in command]


def alive(process: int) -> bool:
    listing = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout
    return bool(listing.strip()) and not listing.startswith("Z")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    base = BaseModel("tiny", tiny_model(max_position_embeddings=1024, vocab_size=VOCAB_SIZE + 20), tiny_tokenizer())
    engine = Engine(base, EngineSettings(model="tiny", max_batch_size=32, kv_cache_bytes=1 << 26))
    engine.start()
    yield engine
    engine.close()


def answers(engine: Engine, structures: Sequence[Structure], **params: object) -> list[Generation]:
    """Answers to the same prompt, one a structure, after it was checked."""
    prompt = tuple(engine.codec.encode("the answer is"))
    requests = []
    for seed, structure in enumerate(structures):
        engine.grammars.check(structure, "structure")
        sampling = SamplingParams(TOKENS, seed=seed, structure=structure, **params)  # type: ignore[arg-type]
        requests.append(GenerationRequest(f"s{seed}", "tenant", prompt, sampling))
    return engine.generate(requests)


def test_answers_to_random_schemas_are_valid(engine: Engine) -> None:
    """At temperature 1, of a model that knows nothing: only the structure keeps it to the point."""
    schemas = [random_schema(seed) for seed in range(200)]
    generations = answers(engine, [schema(wanted) for wanted in schemas])
    ended = 0
    for wanted, generation in zip(schemas, generations, strict=True):
        assert generation.finish_reason in ("stop", "length"), (wanted, generation.error)
        if generation.finish_reason == "stop":
            ended += 1
            value = json.loads(generation.text)
            checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
            jsonschema.Draft202012Validator(wanted, format_checker=checker).validate(value)
    assert ended >= 0.8 * len(schemas)


def random_regexes() -> list[str]:
    """50 regular expressions of the syntax that Python's and Rust's share."""
    parts = [
        "[a-c]{2,5}",
        r"\d{1,3}",
        "(yes|no|maybe)",
        "x+y?",
        r"[^\n]{0,4}",
        r"(\(a\)|\[b\])*;",
        "é|東",
        "-?",
        "(ab){2}",
        ".",
    ]
    return [
        "".join(f"({parts[(number * 7 + place * 3) % len(parts)]})" for place in range(1 + number % 4))
        for number in range(25)
    ] + [f"{parts[number % 10]}/{parts[(number * 3 + 1) % 10]}|{parts[(number + 5) % 10]}" for number in range(25)]


def test_answers_to_regular_expressions_match(engine: Engine) -> None:
    regexes = random_regexes()
    generations = answers(engine, [Structure("regex", regex) for regex in regexes])
    ended = [pair for pair in zip(regexes, generations, strict=True) if pair[1].finish_reason == "stop"]
    assert [(regex, answer.text) for regex, answer in ended if not re.fullmatch(regex, answer.text)] == []
    assert len(ended) >= 0.8 * len(regexes)


@dataclass(frozen=True)
class Kind:
    structure: Structure
    pattern: str


ONE_OR_TWO = {"properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
KINDS = [
    Kind(Structure("choice", '["left", "right"]'), "left|right"),
    Kind(Structure("grammar", 'start: "a" b\nb: "b" | "b" b "c"'), "ab+c*"),
    Kind(tools(ONE_OR_TWO), r'<tool_call>\n{"name": "f", "arguments": {"n": [12]}}\n</tool_call>'),
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_of_the_other_kinds(engine: Engine, temperature: float) -> None:
    for kind, generation in zip(
        KINDS, answers(engine, [kind.structure for kind in KINDS], temperature=temperature), strict=True
    ):
        assert generation.finish_reason == "stop" and re.fullmatch(kind.pattern, generation.text), generation


def test_a_limit_met_on_the_way_ends_that_answer_alone(engine: Engine) -> None:
    hard = schema(
        {"type": "array", "prefixItems": [{"type": "boolean"}, json.loads(many_properties(700).text)], "minItems": 2}
    )
    easy = [schema({"const": "easy"})] * 3
    first, *others = answers(engine, [hard, *easy], temperature=0.0)
    assert first.finish_reason == "error" and first.error is not None and "items" in first.error
    assert [other.text for other in others] == ['"easy"'] * 3
