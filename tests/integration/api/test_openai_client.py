"""The `openai` package as such: both clients, its error classes, its retries, streams that fail."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from serving.engine.core import EngineCore
from tests.integration.api.conftest import BASE, Server, Stream
from tests.support import tiny_tokenizer

FIELDS: dict[str, Any] = {"model": BASE, "prompt": "the fox", "max_tokens": 12, "temperature": 0}


def test_the_asynchronous_client_gets_what_the_synchronous_one_gets(server: Server) -> None:
    url = f"{server.url}/v1"

    async def run() -> tuple[str, str]:
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            whole = await client.completions.create(**FIELDS)
            stream = await client.completions.create(**FIELDS, stream=True)
            return whole.choices[0].text, "".join([chunk.choices[0].text async for chunk in stream])

    with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        expected = client.completions.create(**FIELDS).choices[0].text
        assert asyncio.run(run()) == (expected, expected)
        assert {model.id for model in client.models.list()} == {BASE, "a0", "a1"}
        assert client.models.retrieve("a0").id == "a0"


def test_errors_are_the_clients_own_classes(server: Server) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            client.completions.create(**FIELDS | {"model": "nobody"})
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as wrong:
            client.completions.create(**FIELDS | {"temperature": 3})
        assert (wrong.value.code, wrong.value.param) == ("invalid_value", "temperature")
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(**FIELDS | {"max_tokens": 10_000})
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nobody")


def test_the_client_tries_again_while_the_server_is_full(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full queue is told as 503 with Retry-After, which the client obeys."""
    settings = server.context.engine.settings  # type: ignore[attr-defined]
    monkeypatch.setattr(type(settings), "max_queue", -settings.max_batch_size)
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError) as full:
            client.completions.create(**FIELDS)
        assert (full.value.status_code, full.value.code) == (503, "overloaded")
        assert full.value.response.headers["Retry-After"] == "1"
        threading.Timer(0.5, monkeypatch.undo).start()
        assert client.with_options(max_retries=3).completions.create(**FIELDS).choices[0].text


def test_a_stream_that_fails_says_so_and_ends(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret detail")

    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(**FIELDS | {"max_tokens": 200}, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        monkeypatch.setattr(EngineCore, "_fill_slots", fail)
        with pytest.raises(openai.APIError) as raised:
            list(stream)
        monkeypatch.undo()
        assert "secret" not in str(raised.value)
        assert client.completions.create(**FIELDS).choices[0].text


def test_bad_requests_disturb_nobody(server: Server) -> None:
    running = Stream(server)
    running.wait_for_text()
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        for extra in ({"n": 99}, {"structured_outputs": {"regex": "(" * 30_000}}, {"logprobs": 21}, {"stop": [""]}):
            with pytest.raises(openai.BadRequestError):
                client.completions.create(**FIELDS, extra_body=extra)
    assert running.result() == server.text(max_tokens=200)


def test_tokens_there_and_back(server: Server) -> None:
    reply = server.post("/tokenize", {"prompt": "grüß", "return_token_strs": True}).json()
    assert reply["tokens"] == tiny_tokenizer().encode("grüß")
    assert reply["token_strs"][0] == "<s>" and len(reply["token_strs"]) == reply["count"]
    assert server.post("/detokenize", {"tokens": reply["tokens"]}).json() == {"prompt": "<s>grüß"}
