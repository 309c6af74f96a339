"""Calls of functions through the `openai` package, on a model with room for the functions' description."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.integration.api.conftest import Files, Server, running
from tests.support import save_tiny_model, tiny_tokenizer

BASE = "roomy"
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
NATIVE = """{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}
{%- for message in messages %}{{ message.role }}: {{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


@pytest.fixture(scope="module")
def roomy(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("roomy")
    model = save_tiny_model(folder / BASE, max_position_embeddings=2048)
    with running(Files(model, files.root), folder / "data") as started:
        yield started


@pytest.fixture(scope="module")
def client(roomy: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{roomy.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def chat(client: OpenAI, **fields: Any) -> ChatCompletion:
    defaults: dict[str, Any] = {"model": BASE, "messages": USER, "max_completion_tokens": 220, "temperature": 0}
    return client.chat.completions.create(**{**defaults, **fields})


def prompt_of(server: Server, **fields: Any) -> str:
    """The text that a chat becomes."""
    tokens = server.post("/tokenize", {"messages": USER} | fields).json()["tokens"]
    return str(tiny_tokenizer().decode(tokens))


def streamed(client: OpenAI, **fields: Any) -> list[ChatCompletionChunk]:
    defaults: dict[str, Any] = {"model": BASE, "messages": USER, "max_completion_tokens": 220, "temperature": 0}
    return list(client.chat.completions.create(**{**defaults, **fields}, stream=True))


def call_of(reply: ChatCompletion) -> tuple[str, dict[str, Any]]:
    (call,) = reply.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.id.startswith("call_")
    return call.function.name, json.loads(call.function.arguments)


@pytest.mark.parametrize("temperature", [0, 1.4])
def test_a_named_function_is_called_with_arguments_that_match(client: OpenAI, temperature: float) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": choice, "max_completion_tokens": 200}
    reply = chat(client, temperature=temperature, **fields)
    name, arguments = call_of(reply)
    assert name == "get_weather"
    jsonschema.validate(arguments, WEATHER)
    assert reply.choices[0].message.content is None
    assert reply.choices[0].finish_reason == "stop"  # OpenAI's, where the function was named


def test_a_call_is_required(client: OpenAI) -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "max_completion_tokens": 220}
    reply = chat(client, parallel_tool_calls=False, **fields)
    name, arguments = call_of(reply)
    assert name in {"get_weather", "stop"}
    jsonschema.validate(arguments, WEATHER if name == "get_weather" else {"type": "object", "maxProperties": 0})
    assert reply.choices[0].finish_reason == "tool_calls"


def test_streamed_calls_are_those_of_the_whole_answer(client: OpenAI) -> None:
    fields: dict[str, Any] = {
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_completion_tokens": 220,
    }
    name, arguments = call_of(chat(client, **fields))
    chunks = streamed(client, **fields)
    deltas = [delta for chunk in chunks for choice in chunk.choices for delta in choice.delta.tool_calls or ()]
    assert deltas[0].function is not None and deltas[0].function.name == name
    assert deltas[0].id is not None and deltas[0].id.startswith("call_")
    assert {delta.index for delta in deltas} == {0}
    assert not any(delta.id or (delta.function and delta.function.name) for delta in deltas[1:])
    pieces = [delta.function.arguments or "" for delta in deltas if delta.function]
    assert json.loads("".join(pieces)) == arguments
    assert len(deltas) > 2  # as they come, not at once
    assert not "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_tools_are_described_where_the_template_knows_none(roomy: Server) -> None:
    described = prompt_of(roomy, tools=TOOLS)
    assert "get_weather" in described and "Of a city." in described and "<tool_call>" in described
    assert described.endswith("the fox\nassistant:")


def test_a_conversation_with_calls_and_their_results(roomy: Server) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "stop", "arguments": "{}"}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "stopped"},
    ]
    prompt = prompt_of(roomy, messages=messages)
    assert '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>' in prompt
    assert "<tool_response>\nstopped\n</tool_response>" in prompt


def test_no_tool_is_called_where_none_may_be(client: OpenAI) -> None:
    assert (
        chat(client, tools=TOOLS, tool_choice="none", max_completion_tokens=9).choices[0].message.content
        == chat(client, max_completion_tokens=9).choices[0].message.content
    )


def test_an_answer_is_json_or_a_call(client: OpenAI) -> None:
    kind: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER}}
    message = chat(client, tools=TOOLS, response_format=kind, max_completion_tokens=220).choices[0].message
    if message.tool_calls:
        assert message.tool_calls[0].function.name in {"get_weather", "stop"}  # type: ignore[union-attr]
    else:
        jsonschema.validate(json.loads(message.content or ""), WEATHER)


def test_a_template_that_knows_tools_gets_them(files: Files, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(NATIVE)
    call = {"id": "c1", "type": "function", "function": {"name": "stop", "arguments": '{"a": [1]}'}}
    messages = [
        *USER,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "x"},
    ]
    with running(files, tmp_path / "data", chat_template=str(template)) as server:
        prompt = prompt_of(server, messages=messages, tools=TOOLS)
    assert prompt == (
        "[get_weather][stop]user: the fox;assistant: "
        '<tool_call>\n{"name": "stop", "arguments": {"a": [1]}}\n</tool_call>;tool: x;assistant:'
    )
