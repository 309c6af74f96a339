"""LiteLLM's client against the server, as an OpenAI-compatible one. Knows no route."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import litellm
import pytest
from asked import ASKED, BASE_URL, MODEL, TOOL, assert_arguments, assert_same_text

NAMED = {"type": "function", "function": {"name": TOOL["name"]}}
REQUEST = [{"role": "user", "content": ASKED["request"]}]
CALLING = {"messages": REQUEST, "tools": [{"type": "function", "function": TOOL}], "max_tokens": None}


def asked(model: str = MODEL, **given: Any) -> dict[str, Any]:
    """The arguments of a greedy completion; `given` are added or replaced."""
    server = {"model": f"openai/{model}", "api_base": BASE_URL, "api_key": "none", "num_retries": 0}
    messages = [{"role": "user", "content": ASKED["question"]}]
    fields = server | {"messages": messages, "temperature": 0, "max_tokens": ASKED["max_tokens"]} | given
    return {name: value for name, value in fields.items() if value is not None}


def text_of(chunk: Any) -> str:
    return chunk.choices[0].delta.content or ""


def test_streams_the_answer_that_it_gets_in_one_piece() -> None:
    whole = litellm.completion(**asked())
    chunks = list(litellm.completion(**asked(stream=True, stream_options={"include_usage": True})))
    assert_same_text([text_of(chunk) for chunk in chunks if chunk.choices], whole.choices[0].message.content)
    built = litellm.stream_chunk_builder(chunks)
    assert built.choices[0].finish_reason == whole.choices[0].finish_reason
    assert built.usage.completion_tokens == whole.usage.completion_tokens > 5


def test_streams_to_a_coroutine() -> None:
    async def run() -> tuple[list[str], str]:
        parts = [text_of(chunk) async for chunk in await litellm.acompletion(**asked(stream=True))]
        return parts, (await litellm.acompletion(**asked())).choices[0].message.content

    assert_same_text(*asyncio.run(run()))


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_streams_a_tool_call(choice: Any) -> None:
    whole = litellm.completion(**asked(**CALLING, tool_choice=choice))
    chunks = list(litellm.completion(**asked(**CALLING, tool_choice=choice, stream=True)))
    (call,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert call.function.name == TOOL["name"] and call.id
    assert call.function.arguments == whole.choices[0].message.tool_calls[0].function.arguments
    assert_arguments(json.loads(call.function.arguments))
    assert whole.choices[0].finish_reason in {"tool_calls", "stop"}


def test_goes_on_with_the_result_of_a_tool() -> None:
    message = litellm.completion(**asked(**CALLING, tool_choice="required")).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": ASKED["result"]}
    turns = {**CALLING, "messages": [*REQUEST, message, result], "max_tokens": 32}
    assert litellm.completion(**asked(**turns, tool_choice="none")).choices[0].message.content


def test_an_answer_in_json_of_a_schema() -> None:
    schema = {"name": "booking", "schema": TOOL["parameters"], "strict": True}
    form = {"type": "json_schema", "json_schema": schema}
    answer = litellm.completion(**asked(messages=REQUEST, max_tokens=64, response_format=form))
    assert_arguments(json.loads(answer.choices[0].message.content))


def test_a_completion() -> None:
    given = {**asked(messages=None, prompt=ASKED["question"])}
    whole = litellm.text_completion(**given).choices[0].text
    chunks = list(litellm.text_completion(**given, stream=True))
    assert_same_text([chunk.choices[0].text or "" for chunk in chunks], whole)


def test_embeddings() -> None:
    server = {"model": f"openai/{MODEL}", "api_base": BASE_URL, "api_key": "none"}
    found = litellm.embedding(input=[ASKED["question"], ASKED["request"]], encoding_format="float", **server)
    assert [len(entry["embedding"]) for entry in found.data] == [640, 640]


def test_an_unknown_model_is_not_found() -> None:
    with pytest.raises(litellm.NotFoundError, match=ASKED["unknown"]):
        litellm.completion(**asked(ASKED["unknown"]))
    with pytest.raises(litellm.NotFoundError, match=ASKED["unknown"]):
        list(litellm.completion(**asked(ASKED["unknown"], stream=True)))
