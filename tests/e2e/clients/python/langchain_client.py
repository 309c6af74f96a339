"""LangChain's `ChatOpenAI` against the server: answers, tools, structured answers, errors. Knows no route."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from asked import ASKED, BASE_URL, MODEL, TOOL, assert_arguments, assert_same_text
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

NAME = TOOL["name"]
FUNCTION = {"type": "function", "function": TOOL}
SCHEMA = {"title": "booking", "description": TOOL["description"], **TOOL["parameters"]}


def chat(model: str = MODEL, **given: Any) -> ChatOpenAI:
    fields = {"temperature": 0, "max_tokens": ASKED["max_tokens"], "max_retries": 0} | given
    return ChatOpenAI(model=model, base_url=BASE_URL, api_key="none", **fields)


def joined(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_streams_the_answer_that_it_gets_in_one_piece(responses: bool) -> None:
    model = chat(use_responses_api=responses, stream_usage=True)
    whole = model.invoke(ASKED["question"])
    chunks = list(model.stream(ASKED["question"]))
    assert_same_text([chunk.text for chunk in chunks], whole.text)
    assert whole.usage_metadata is not None and whole.usage_metadata["input_tokens"] > 10
    usage = joined(chunks).usage_metadata
    assert usage is not None and usage["output_tokens"] == whole.usage_metadata["output_tokens"]
    if not responses:
        assert joined(chunks).response_metadata["finish_reason"] == whole.response_metadata["finish_reason"]


def test_in_coroutines() -> None:
    """One loop for all, since LangChain keeps its connections for the next model."""
    model = chat()
    structured = chat(max_tokens=64).with_structured_output(SCHEMA, method="json_schema")

    async def run() -> tuple[list[str], list[str], Any]:
        parts = [chunk.text async for chunk in model.astream(ASKED["question"])]
        answers = await model.abatch([ASKED["question"], ASKED["request"]])
        return parts, [answer.text for answer in answers], await structured.ainvoke(ASKED["request"])

    parts, answers, booking = asyncio.run(run())
    assert_same_text(parts, answers[0])
    assert answers[1] != answers[0]
    assert_arguments(booking)


@pytest.mark.parametrize("choice", ["required", NAME])
def test_streams_a_tool_call(choice: str) -> None:
    model = chat(max_tokens=None).bind_tools([FUNCTION], tool_choice=choice)
    (whole,) = model.invoke(ASKED["request"]).tool_calls
    chunks = list(model.stream(ASKED["request"]))
    assert len([chunk for chunk in chunks if chunk.tool_call_chunks]) > 2
    (call,) = joined(chunks).tool_calls
    assert call["name"] == NAME and call["id"]
    assert call["args"] == whole["args"]
    assert_arguments(call["args"])


def test_goes_on_with_the_result_of_a_tool() -> None:
    model = chat(max_tokens=32)
    calls = model.bind_tools([FUNCTION], tool_choice="required").invoke(ASKED["request"])
    result = ToolMessage(ASKED["result"], tool_call_id=calls.tool_calls[0]["id"])
    answer = model.bind_tools([FUNCTION], tool_choice="none").invoke([HumanMessage(ASKED["request"]), calls, result])
    assert answer.text
    assert answer.tool_calls == []


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(method: str) -> None:
    model = chat(max_tokens=64).with_structured_output(SCHEMA, method=method, strict=True)
    assert_arguments(model.invoke(ASKED["request"]))


def test_log_probabilities() -> None:
    answer = chat(logprobs=True, top_logprobs=2).invoke(ASKED["question"])
    tokens = answer.response_metadata["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == answer.text
    assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] <= 0 for token in tokens)


def test_a_completion() -> None:
    model = OpenAI(model=MODEL, base_url=BASE_URL, api_key="none", temperature=0, max_tokens=ASKED["max_tokens"])
    assert_same_text(list(model.stream(ASKED["question"])), model.invoke(ASKED["question"]))


def test_embeddings() -> None:
    model = OpenAIEmbeddings(model=MODEL, base_url=BASE_URL, api_key="none", check_embedding_ctx_length=False)
    first, second = model.embed_documents([ASKED["question"], ASKED["request"]])
    assert len(first) == len(second) == 640
    assert first != second
    assert model.embed_query(ASKED["question"]) == pytest.approx(first, abs=1e-4)


def test_an_unknown_model_is_not_found() -> None:
    model = chat(ASKED["unknown"])
    with pytest.raises(openai.NotFoundError) as caught:
        model.invoke(ASKED["question"])
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        next(model.stream(ASKED["question"]))
