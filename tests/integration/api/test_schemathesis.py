"""Whatever fits the specification, and whatever does not: the server answers as it documents, and stays up.

The model has 300 tokens and the server few adapters, which the specification does not know. So what is drawn to fit
is narrowed to what this server can answer, for the most part, or hardly any request would reach the model; what is
drawn not to fit is drawn from the specification as it is.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS
from schemathesis.schemas import APIOperation

from serving.api.operations import OPERATIONS
from tests.integration.api.conftest import BASE, Files, Server, running

EXAMPLES = 100
KEYS: list[str] = []  # of the tenant `doomed`, before each operation
MOST_TOKENS = 8
MODELS = [BASE, "a0", f"{BASE}:a1"]
REMOVABLE = ["a2", "a3", "nobody"]  # what the operations that remove adapters may name
TOKEN = {"enum": list(range(3, 300))}
TEXT = {"type": "string", "minLength": 1, "maxLength": 12}
OBJECT = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "look", "parameters": OBJECT}}
TURNS = [
    [{"role": "user", "content": "the fox"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "☕"}]}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
]


def or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def numbers(least: int, most: int) -> dict[str, Any]:
    """Spelled out, for 1.0 is an integer of a schema too and none for the server."""
    return {"enum": [*range(least, most + 1), None]}


def several(items: dict[str, Any], most: int = 2) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": most}


PROMPT = {"anyOf": [TEXT, several(TEXT), several(TOKEN, 6), several(several(TOKEN, 6))]}
LENGTH = {"enum": list(range(1, MOST_TOKENS + 1))}  # never null: without it an answer may fill the context
LENGTHS = {"max_tokens", "max_completion_tokens", "max_output_tokens"}
NARROWED: dict[str, dict[str, Any]] = {
    "model": {"enum": MODELS},
    "adapter_id": {"enum": [None, "a0", "a1", "base", ""]},
    "adapter": {"enum": [None, "a0", "a1", "nobody"]},
    "tokens": several(TOKEN, 6),
    "messages": {"enum": TURNS},
    "max_tokens": LENGTH,
    "max_completion_tokens": LENGTH,
    "max_output_tokens": LENGTH,
    "min_tokens": numbers(0, 1),
    "top_k": numbers(-1, 5),
    "seed": numbers(-2, 5),
    "priority": numbers(-2, 5),
    "n": numbers(1, 2),
    "logprobs": numbers(0, 3),
    "top_logprobs": {"type": "null"},
    "prompt_logprobs": numbers(0, 3),
    "truncate_prompt_tokens": numbers(1, 64),
    "stop": or_null(several(TEXT)),
    "bad_words": or_null(several(TEXT)),
    "stop_token_ids": or_null(several(TOKEN)),
    "allowed_token_ids": or_null(several(TOKEN, 5)),
    "logit_bias": {"enum": [None, {}, {"5": -100, "17": 3.5}]},
    "response_format": {"enum": [None, {"type": "text"}, {"type": "json_object"}]},
    "structured_outputs": {"enum": [None, None, {"regex": "[a-z]{1,4}"}, {"choice": ["yes", "no"]}]},
    "tools": {"enum": [None, None, [], [TOOL]]},
    "tool_choice": {"enum": [None, "none", "auto"]},
    "text": {"enum": [None, {"format": {"type": "text"}}, {"format": {"type": "json_object"}}]},
    "chat_template_kwargs": {"enum": [None, {}, {"mood": "calm"}]},
    "stream_options": {"type": "null"},
    "continue_final_message": {"enum": [None, False]},
}
NARROWED_IN: dict[str, dict[str, dict[str, Any]]] = {
    "CompletionBody": {"prompt": PROMPT},
    "ChatBody": {"logprobs": or_null({"type": "boolean"})},
    "ResponseBody": {"input": {"anyOf": [TEXT, {"enum": TURNS}]}},
    "EmbeddingBody": {"input": PROMPT},
    "TokenizeBody": {"prompt": TEXT, "messages": {"type": "null"}},
}


ALL = {*NARROWED, *(field for fields in NARROWED_IN.values() for field in fields)}


def narrowed(document: dict[str, Any], fields: set[str]) -> dict[str, Any]:
    """The specification for this server: what exists in it, and answers of few tokens. Of bodies only `fields`."""
    document = copy.deepcopy(document)
    for name, schema in document["components"]["schemas"].items():
        if name.endswith("Body"):
            values = {**NARROWED, **NARROWED_IN.get(name, {})}
            properties = schema["properties"]
            properties |= {key: values[key] for key in properties if key in values and key in fields | LENGTHS}
            schema["required"] = [*schema.get("required", ()), *(key for key in properties if key in LENGTHS)]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for parameter in operation.get("parameters", ()):
                if path.startswith("/admin"):
                    if parameter["in"] == "path":
                        parameter["schema"] = {"enum": _registered(parameter["name"], method)}
                else:
                    parameter["schema"] = {"enum": _values(parameter["name"], path, method)}
    return document


def _registered(name: str, method: str) -> list[Any]:
    """What the paths of `/admin` may name: what is there, for the most part."""
    if name == "id":
        return [*KEYS, "nobody"]
    return ["doomed", "nobody"] if method == "delete" else ["t0", "t1", "nobody"]


def register_tenants(server: Server) -> None:
    """Make sure of the tenants that requests may name, with keys of one of them that may be revoked."""
    for name in ("t0", "t1", "doomed"):
        server.post("/admin/tenants", {"name": name})
    KEYS.clear()
    KEYS.extend(server.post("/admin/tenants/doomed/keys", {}).json()["id"] for _ in range(3))


def _values(name: str, path: str, method: str) -> list[Any]:
    removes = method == "delete" or path.endswith("/activate")
    return {
        "model": [*MODELS, "nobody", "a0@0123456789abcdef"],
        "revision": ["0123456789abcdef"],
        "limit": [1, 2, 1000],
    }.get(name, REMOVABLE if removes else ["a0", "a1", "nobody"])


@pytest.fixture(scope="module")
def target(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    adapters = tuple(f"a{number}={files.adapter(number)}" for number in range(4))
    with running(files, tmp_path_factory.mktemp("data"), adapter=adapters) as started:
        yield started


def operation_ids() -> list[str]:
    return sorted(OPERATIONS)


def operation_of(document: dict[str, Any], operation_id: str) -> APIOperation[Any, Any, Any]:
    schema = schemathesis.openapi.from_dict(document)
    found = (result.ok() for result in schema.get_all_operations())
    return next(item for item in found if item.definition.raw["operationId"] == operation_id)


def administrative(document: dict[str, Any]) -> set[str]:
    """The operations below `/admin`."""
    paths = document["paths"].items()
    return {entry["operationId"] for path, methods in paths if "/admin" in path for entry in methods.values()}


def statuses_of(operation: APIOperation[Any, Any, Any], mode: GenerationMode, url: str) -> Counter[int]:
    """Sends what hypothesis draws; every answer must pass every check."""
    counts: Counter[int] = Counter()
    excluded = CHECKS.get_by_names(["positive_data_acceptance"])

    @settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Case) -> None:
        reply = case.call_and_validate(base_url=url, excluded_checks=excluded, timeout=60)
        counts[reply.status_code] += 1

    send()
    return counts


@pytest.mark.parametrize("operation_id", operation_ids())
def test_what_fits_the_specification(target: Server, operation_id: str) -> None:
    """Any field as it is specified, but for those that only cost time."""
    register_tenants(target)
    document = narrowed(target.client.get("/openapi.json").json(), fields={"model", "n"})
    counts = statuses_of(operation_of(document, operation_id), GenerationMode.POSITIVE, target.url)
    if operation_id in administrative(document):
        assert any(status < 300 for status in counts), counts
    target.wait_until_idle(5)


@pytest.mark.parametrize("operation_id", operation_ids())
def test_what_also_fits_this_server(target: Server, operation_id: str) -> None:
    register_tenants(target)
    document = narrowed(target.client.get("/openapi.json").json(), fields=ALL)
    counts = statuses_of(operation_of(document, operation_id), GenerationMode.POSITIVE, target.url)
    if OPERATIONS[operation_id].generating:
        assert sum(count for status, count in counts.items() if status < 300) >= EXAMPLES // 2, counts
    target.wait_until_idle(5)


@pytest.mark.parametrize("operation_id", operation_ids())
def test_what_does_not_fit_it(target: Server, operation_id: str) -> None:
    operation = operation_of(target.client.get("/openapi.json").json(), operation_id)
    if operation.body or any("pattern" in item.definition["schema"] for item in operation.path_parameters):
        statuses_of(operation, GenerationMode.NEGATIVE, target.url)
        target.wait_until_idle(5)
