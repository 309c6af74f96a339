"""`/v1/responses` and `/v1/embeddings` through the `openai` package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import torch
from openai import BadRequestError, NotFoundError, OpenAI

from tests.integration.api.conftest import BASE, Server
from tests.support import CONTEXT, tiny_model, tiny_tokenizer
from vblora import VBLoRAModel

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"side": {"enum": ["left", "right"]}},
    "required": ["side"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def respond(client: OpenAI, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    defaults: dict[str, Any] = {"model": BASE, "input": "the fox", "max_output_tokens": 12, "temperature": 0}
    return client.responses.create(**{**defaults, **fields}, extra_body={"ignore_eos": True, **(extra or {})})


def chat(server: Server, messages: list[dict[str, str]], **fields: Any) -> str:
    body = {"model": BASE, "messages": messages, "max_tokens": 12, "temperature": 0, "ignore_eos": True} | fields
    return str(server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"])


def test_a_response_is_the_chats_answer(server: Server, client: OpenAI) -> None:
    user = {"role": "user", "content": "the fox"}
    reply = respond(client)
    assert reply.output_text == chat(server, [user])
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert reply.usage.output_tokens == 12
    assert reply.usage.total_tokens == reply.usage.input_tokens + 12
    system = {"role": "system", "content": "be brief"}
    assert respond(client, instructions="be brief").output_text == chat(server, [system, user])
    parts: Any = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "input_text", "text": "the fox"}]},
    ]
    assert respond(client, input=parts).output_text == chat(server, [system, user])
    assert respond(client, model="a0").output_text == chat(server, [user], model="a0") != reply.output_text
    assert respond(client, temperature=1, top_p=0.9, extra={"seed": 3}).output_text == chat(
        server, [user], temperature=1, top_p=0.9, seed=3
    )


def test_an_answer_that_ends_by_itself_is_completed(client: OpenAI) -> None:
    named = {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}}
    reply = respond(client, {"ignore_eos": False}, text=named, max_output_tokens=40)
    jsonschema.validate(json.loads(reply.output_text), SCHEMA)
    assert reply.status == "completed"
    assert reply.incomplete_details is None
    begun = respond(client, {"ignore_eos": False}, text={"format": {"type": "json_object"}})
    assert begun.output_text.startswith("{")


def test_a_stream_has_openais_events(client: OpenAI) -> None:
    whole = respond(client)
    events = list(respond(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert deltas > 3
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
    assert events[0].response.status == "in_progress" and events[0].response.usage is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": CONTEXT}, "input"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"format": {"type": "json_schema", "name": "s"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "s", "schema": {"type": "wish"}}}}, "text.format.schema"),
        ({"truncation": "auto"}, "truncation"),
        ({"extra": {"min_tokens": 13}}, "min_tokens"),
    ],
    ids=str,
)
def test_responses_that_are_refused(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as raised:
        respond(client, {"ignore_eos": False, **fields.pop("extra", {})}, **fields)
    assert raised.value.param == param


def mean_hidden(text: str, model: torch.nn.Module | None = None) -> list[float]:
    """By transformers alone."""
    ids = torch.tensor([tiny_tokenizer().encode(text)])
    with torch.no_grad():
        hidden = (model or tiny_model())(ids, output_hidden_states=True).hidden_states[-1][0]
    return list(map(float, hidden.mean(0)))


def test_embeddings_are_the_mean_of_the_last_hidden_states(server: Server, client: OpenAI) -> None:
    texts = ["the fox", "best food of the town"]
    reply = client.embeddings.create(model=BASE, input=texts, encoding_format="float")
    for entry, text in zip(reply.data, texts, strict=True):
        assert entry.embedding == pytest.approx(mean_hidden(text), abs=1e-5)
    assert reply.usage.prompt_tokens == sum(len(tiny_tokenizer().encode(text)) for text in texts)
    assert client.embeddings.create(model=BASE, input=texts).data[1].embedding == pytest.approx(  # base64
        reply.data[1].embedding, abs=1e-6
    )
    ids = tiny_tokenizer().encode(texts[0])
    assert client.embeddings.create(model=BASE, input=ids).data[0].embedding == pytest.approx(
        reply.data[0].embedding, abs=1e-5
    )


def test_embeddings_of_an_adapter(server: Server, client: OpenAI) -> None:
    folder = server.context.catalog._roots[0] / "a1"  # type: ignore[attr-defined]
    merged = VBLoRAModel.from_pretrained(tiny_model(), folder, "a1").merge_and_unload()
    vector = client.embeddings.create(model="a1", input="the fox").data[0].embedding
    assert vector == pytest.approx(mean_hidden("the fox", merged), abs=1e-4)
    assert vector != pytest.approx(mean_hidden("the fox"), abs=1e-2)


def test_a_long_text_is_pooled_over_several_steps_beside_others(server: Server, client: OpenAI) -> None:
    text = "the quick brown fox " * 10
    several = client.embeddings.create(model=BASE, input=[text, "a", text]).data
    for entry in (several[0], several[2]):
        assert entry.embedding == pytest.approx(mean_hidden(text), abs=1e-5)


def test_embeddings_that_are_refused(client: OpenAI) -> None:
    for fields, param in (
        ({"input": ""}, "input"),
        ({"input": "fox " * CONTEXT}, "input"),
        ({"input": [300]}, "input"),
        ({"input": "x", "dimensions": 4}, "dimensions"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
    ):
        with pytest.raises(BadRequestError) as raised:
            client.embeddings.create(**{"model": BASE, **fields})  # type: ignore[arg-type]
        assert raised.value.param == param
    with pytest.raises(NotFoundError):
        client.embeddings.create(model="nobody", input="x")
