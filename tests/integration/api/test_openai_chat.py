"""Every field of `/v1/chat/completions` that `/v1/completions` has not, through the `openai` package, by its effect."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from openai import BadRequestError, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.integration.api.conftest import BASE, Server
from tests.support import tiny_tokenizer

USER: Any = [{"role": "user", "content": "the fox"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "description": "Of a city.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "stop"}},
]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def chat(client: OpenAI, extra: dict[str, Any] | None = None, **fields: Any) -> ChatCompletion:
    defaults: dict[str, Any] = {"model": BASE, "messages": USER, "max_completion_tokens": 12, "temperature": 0}
    return client.chat.completions.create(**{**defaults, **fields}, extra_body=extra or {})


def answer(client: OpenAI, extra: dict[str, Any] | None = None, **fields: Any) -> str:
    return chat(client, {"ignore_eos": True, **(extra or {})}, **fields).choices[0].message.content or ""


def prompt_of(server: Server, **fields: Any) -> str:
    """The text that a chat becomes."""
    tokens = server.post("/tokenize", {"messages": USER} | fields).json()["tokens"]
    return str(tiny_tokenizer().decode(tokens))


def test_a_chat_is_a_completion_of_what_the_template_makes_of_it(server: Server, client: OpenAI) -> None:
    messages = [{"role": "system", "content": "be brief"}, *USER]
    prompt = prompt_of(server, messages=messages)
    assert prompt == "system: be brief\nuser: the fox\nassistant:"
    plain = server.text(prompt=prompt, add_special_tokens=False)
    assert answer(client, messages=messages) == plain


def test_an_answer_can_be_begun_for_the_model(server: Server, client: OpenAI) -> None:
    messages = [*USER, {"role": "assistant", "content": "It"}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    assert prompt_of(server, messages=messages, **fields).endswith("assistant: It")
    assert prompt_of(server, messages=messages, continue_final_message=True).endswith("assistant: It")
    assert prompt_of(server, add_generation_prompt=False) == "user: the fox\n"
    begun = server.text(prompt="user: the fox\nassistant: It", add_special_tokens=False)
    assert answer(client, fields, messages=messages) == begun
    with pytest.raises(BadRequestError) as raised:
        answer(client, {"continue_final_message": True, "add_generation_prompt": True})
    assert raised.value.param == "continue_final_message"


def test_arguments_of_the_template(server: Server, client: OpenAI) -> None:
    assert answer(client, {"chat_template_kwargs": {"mood": "calm"}}) == answer(client)
    with pytest.raises(BadRequestError) as raised:
        answer(client, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}})
    assert raised.value.param == "chat_template_kwargs.chat_template"


def test_logprobs_tell_of_each_token(server: Server, client: OpenAI) -> None:
    reply = chat(client, {"ignore_eos": True}, logprobs=True, top_logprobs=3)
    content = reply.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None and len(content) == 12
    prompt = tiny_tokenizer().encode(prompt_of(server), add_special_tokens=False)
    plain = server.complete(prompt=prompt, logprobs=3).json()["choices"][0]["logprobs"]
    assert [entry.logprob for entry in content] == pytest.approx(plain["token_logprobs"], abs=1e-5)
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == max(top.logprob for top in entry.top_logprobs) >= entry.logprob
        assert entry.bytes is not None and bytes(entry.bytes).decode("utf-8", "replace") == entry.token
    told = b"".join(bytes(entry.bytes or ()) for entry in content).decode("utf-8", "replace")
    assert told == reply.choices[0].message.content
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []  # type: ignore[union-attr,index]
    assert chat(client).choices[0].logprobs is None
    with pytest.raises(BadRequestError) as raised:
        chat(client, top_logprobs=2)
    assert raised.value.param == "top_logprobs"


def test_several_choices(client: OpenAI) -> None:
    reply = chat(client, {"ignore_eos": True}, n=3, temperature=1, seed=4)
    alone = [answer(client, temperature=1, seed=4 + index) for index in range(3)]
    assert [choice.message.content for choice in reply.choices] == alone


def test_prompt_logprobs_stand_beside_the_choices(server: Server, client: OpenAI) -> None:
    reply = chat(client, {"prompt_logprobs": 1}, n=2)
    entries = (reply.model_extra or {})["prompt_logprobs"]
    assert len(entries) == len(server.post("/tokenize", {"messages": USER}).json()["tokens"])
    assert entries[0] is None and all(entries[1:])
    stream = client.chat.completions.create(
        model=BASE, messages=USER, max_tokens=3, temperature=0, stream=True, extra_body={"prompt_logprobs": 1}
    )
    told = [(chunk.model_extra or {}).get("prompt_logprobs") for chunk in stream]
    assert told[0] == entries and set(map(str, told[1:])) == {"None"}


def streamed(client: OpenAI, **fields: Any) -> list[ChatCompletionChunk]:
    defaults: dict[str, Any] = {"model": BASE, "messages": USER, "max_completion_tokens": 200, "temperature": 0}
    return list(client.chat.completions.create(**{**defaults, **fields}, stream=True))


def test_a_stream_with_logprobs(client: OpenAI) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "max_completion_tokens": 9, "n": 2}
    whole = chat(client, **fields)
    for index in range(2):
        entries = [
            entry
            for chunk in streamed(client, **fields)
            for choice in chunk.choices
            if choice.index == index and choice.logprobs
            for entry in choice.logprobs.content or ()
        ]
        expected = whole.choices[index].logprobs.content  # type: ignore[union-attr]
        assert expected is not None
        assert [entry.token for entry in entries] == [entry.token for entry in expected]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": TOOLS}, "tool_choice"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "fly"}}, "tools": TOOLS},
            "tool_choice.function.name",
        ),
        ({"tools": [TOOLS[1], TOOLS[1]]}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        (
            {"tools": [TOOLS[1], {"type": "function", "function": {"name": "f", "parameters": {"type": "wish"}}}]},
            "tools.1.function.parameters",
        ),
        ({"tools": [{"type": "function", "function": {"name": f"f{n}"}} for n in range(129)]}, "tools"),
    ],
    ids=str,
)
def test_tools_that_are_refused(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as raised:
        chat(client, **fields)
    assert raised.value.param == param


def test_json_objects_and_schemas(client: OpenAI) -> None:
    kind: Any = {"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": WEATHER}}
    reply = chat(client, response_format=kind, temperature=1.2, max_completion_tokens=200)
    jsonschema.validate(json.loads(reply.choices[0].message.content or ""), WEATHER)
    for format_ in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "any"}}):
        begun = chat(client, response_format=format_, max_completion_tokens=20).choices[0].message.content or ""
        assert begun.startswith("{")
    assert (
        chat(client, response_format={"type": "text"}).choices[0].message.content
        == chat(client).choices[0].message.content
    )


@pytest.mark.parametrize(
    ("outputs", "accepted"),
    [
        ({"choice": ["yes", "no", "maybe"]}, r"yes|no|maybe"),
        ({"regex": "[ab]{3}-[0-9]{2}"}, "[ab]{3}-[0-9]{2}"),
        ({"grammar": 'start: "x" NUMBER\nNUMBER: /[0-9]{4}/'}, "x[0-9]{4}"),
        ({"json": {"enum": ["left", "right"]}}, '"(left|right)"'),
        ({"json": '{"enum": ["left", "right"]}'}, '"(left|right)"'),
    ],
    ids=str,
)
def test_structured_outputs(client: OpenAI, outputs: dict[str, Any], accepted: str) -> None:
    import re

    for seed in range(4):
        reply = chat(client, {"structured_outputs": outputs}, temperature=1.5, seed=seed, max_completion_tokens=40)
        assert re.fullmatch(accepted, reply.choices[0].message.content or "")
        assert reply.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"regex": "(" * 30_000}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "x" * (64 * 2**10 + 1)}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "start: ("}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a"] * 1025}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"type": "wish"}}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 1}, "min_tokens"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}}},
            "response_format.json_schema.schema",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_structures_that_are_refused(server: Server, client: OpenAI, extra: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as raised:
        chat(client, extra)
    assert raised.value.param == param
    assert len(raised.value.message) < 600
    assert server.context.engine.stats().requests_waiting == 0


def test_an_unsupported_keyword_is_named(client: OpenAI) -> None:
    schema = {"type": "array", "uniqueItems": True}
    kind: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    with pytest.raises(BadRequestError, match="uniqueItems"):
        chat(client, response_format=kind)
