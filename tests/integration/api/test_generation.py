"""The two generating routes as a client meets them: shapes, streams, choices, parameters, which adapter answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import OpenAI

from tests.integration.api.conftest import BASE, Files, Server
from tests.support import CONTEXT, tiny_tokenizer

ADAPTER_HEADER = "X-VBLoRA-Adapter"
CHAT: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "the fox"}], "temperature": 0}


def stream_of(server: Server, path: str, body: dict[str, Any]) -> list[Any]:
    """The events of a stream, the last one being ``[DONE]``."""
    with server.client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_completion_has_openais_shape(server: Server) -> None:
    reply = server.complete(request_id="my-id.1", max_tokens=5)
    assert reply.headers[ADAPTER_HEADER] == "base"
    body = reply.json()
    text = body["choices"][0].pop("text")
    assert body.pop("created") > 0
    assert body == {
        "id": "cmpl-my-id.1",
        "object": "text_completion",
        "model": BASE,
        "choices": [{"index": 0, "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 4,
            "completion_tokens": 5,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    assert text


def cached(server: Server, **fields: Any) -> int:
    """How many tokens of a prompt of 40 were in the cache."""
    reply = server.complete(prompt=[*range(5, 45)], max_tokens=1, **fields)
    return int(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_repeated_prefix_is_cached_for_the_same_content_and_salt_only(server: Server, files: Files) -> None:
    server.client.post("/v1/adapters", **files.upload("mine", 2))
    try:
        for fields in (
            {},
            {"model": "mine"},
            {"model": "a0"},
            {"cache_salt": "s"},
            {"model": "mine", "cache_salt": "s"},
        ):
            assert [cached(server, **fields) for _ in range(2)] == [0, 32]
        server.client.post("/v1/adapters", **files.upload("mine", 3))
        assert [cached(server, model="mine") for _ in range(2)] == [0, 32]
        rows = server.complete(prompt=[[*range(5, 45)]] * 2, max_tokens=1).json()["usage"]
        assert rows["prompt_tokens_details"] == {"cached_tokens": 64}
    finally:
        server.client.delete("/v1/adapters/mine")


def test_sixteen_tokens_are_the_default_of_completions(server: Server) -> None:
    usage = server.complete(max_tokens=None).json()["usage"]
    assert usage["completion_tokens"] == 16


def test_a_stream_says_the_same_as_a_whole_answer(server: Server) -> None:
    whole = server.complete(max_tokens=30).json()
    body = {"model": BASE, "prompt": "the fox", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    events = stream_of(server, "/v1/completions", body | {"stream_options": {"include_usage": True}})
    usage = events.pop()
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events)
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
    assert [event["choices"][0]["finish_reason"] for event in events][-1] == "length"
    assert {event["choices"][0]["finish_reason"] for event in events[:-1]} == {None}


def test_without_the_option_no_chunk_tells_usage(server: Server) -> None:
    events = stream_of(server, "/v1/completions", {"model": BASE, "prompt": "a", "max_tokens": 3})
    assert not any("usage" in event for event in events)


def test_a_chat_has_openais_shape(server: Server) -> None:
    body = server.post("/v1/chat/completions", CHAT | {"max_tokens": 5, "ignore_eos": True}).json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    choice = body["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] == "length"


def test_a_chat_may_fill_the_context(server: Server) -> None:
    usage = server.post("/v1/chat/completions", CHAT | {"ignore_eos": True}).json()["usage"]
    assert usage["total_tokens"] == CONTEXT


def test_the_role_comes_first_in_a_chat_stream(server: Server) -> None:
    body = CHAT | {"max_tokens": 20, "ignore_eos": True}
    whole = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    events = stream_of(server, "/v1/chat/completions", body)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0]["role"] == "assistant"
    assert not any("role" in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == whole
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


def test_text_parts_are_joined_and_developer_means_system(server: Server) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "fox"}]
    joined = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the fox"}]
    tokens = [server.post("/tokenize", {"messages": messages}).json()["tokens"] for messages in (joined, plain)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("stream", [False, True])
def test_each_prompt_is_a_choice(server: Server, stream: bool) -> None:
    prompts = ["the fox", "a dog", "the town"]
    singly = [server.text(prompt=prompt) for prompt in prompts]
    assert len(set(singly)) == 3
    if stream:
        body = {"model": BASE, "prompt": prompts, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        together = ["", "", ""]
        for event in stream_of(server, "/v1/completions", body):
            together[event["choices"][0]["index"]] += event["choices"][0]["text"]
    else:
        choices = server.complete(prompt=prompts).json()["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2]
        together = [choice["text"] for choice in choices]
    assert together == singly


def test_token_ids_are_taken_as_they_are(server: Server) -> None:
    tokens = tiny_tokenizer()("the fox").input_ids
    expected = server.text()
    assert server.text(prompt=tokens) == expected
    both = server.complete(prompt=[tokens, tokens[1:]]).json()["choices"]
    assert both[0]["text"] == expected != both[1]["text"]
    assert server.text(prompt=tokens[1:]) == server.text(add_special_tokens=False) != expected


def test_stop_strings_end_the_text_before_them(server: Server) -> None:
    text = server.text(max_tokens=40)
    stop = text[10:12]
    reply = server.complete(max_tokens=40, stop=stop).json()["choices"][0]
    assert reply == {"index": 0, "text": text[: text.index(stop)], "logprobs": None, "finish_reason": "stop"}


def test_parameters_reach_the_sampler(server: Server) -> None:
    greedy = server.text()
    sampled = {server.text(temperature=1.5, seed=seed) for seed in range(4)}
    assert len(sampled) == 4
    assert server.text(temperature=1.5, seed=-7) == server.text(temperature=1.5, seed=-7)
    assert server.text(temperature=1.5, top_k=1) == greedy
    assert server.text(temperature=1.5, top_k=-1, seed=1) in sampled
    assert server.text(temperature=1.5, top_p=1e-9) == greedy
    assert server.text(temperature=1.5, min_p=1) == greedy
    assert server.text(temperature=1e-9) == greedy
    assert server.text(logit_bias={"70": 100}) == tiny_tokenizer().decode([70] * 12)
    assert server.text(repetition_penalty=100) != greedy
    assert server.text(frequency_penalty=2) != greedy or server.text(presence_penalty=2) != greedy


def test_extreme_parameters_end_well(server: Server) -> None:
    for fields in ({"temperature": 1e-300}, {"repetition_penalty": 0.01}, {"seed": 2**63 - 1}, {"seed": -(2**63)}):
        assert server.complete(**({"temperature": 1.5} | fields)).status_code == 200, fields


def test_end_of_text_ends_unless_ignored(server: Server) -> None:
    bias = {"1": 100}
    ended = server.complete(logit_bias=bias, ignore_eos=False).json()
    assert ended["choices"][0]["finish_reason"] == "stop"
    assert ended["choices"][0]["text"] == ""
    assert server.complete(logit_bias=bias, ignore_eos=True).json()["choices"][0]["finish_reason"] == "length"
    later = server.complete(logit_bias=bias, ignore_eos=False, min_tokens=4).json()
    assert later["usage"]["completion_tokens"] >= 4
    stopped = server.complete(logit_bias={"70": 100}, stop_token_ids=[70]).json()
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert server.text(logit_bias=bias, skip_special_tokens=False, max_tokens=2) == "</s></s>"


def test_fields_without_effect_and_unknown_ones_change_nothing(server: Server) -> None:
    harmless = {"n": 1, "best_of": 1, "echo": False, "logprobs": None, "store": False, "tools": [], "made_up": 7}
    harmless |= {"response_format": {"type": "text"}, "user": "someone", "priority": 0, "parallel_tool_calls": True}
    assert server.text(**harmless) == server.text()


def test_which_adapter_answers(server: Server) -> None:
    texts = {"base": server.text(), "a0": server.text(model="a0"), "a1": server.text(model="a1")}
    assert len(set(texts.values())) == 3
    revisions = {entry.name: entry.active_revision for entry in server.context.catalog.list("default")}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": f"a0@{revisions['a0']}"}, "a0"),
        ({"model": f"{BASE}:a0"}, "a0"),
        ({"model": f"{BASE}:a0@{revisions['a0']}"}, "a0"),
        ({"model": "a0", "adapter_id": "a1"}, "a1"),
        ({"adapter_id": "a1"}, "a1"),
        ({"adapter_id": f"a1@{revisions['a1']}"}, "a1"),
        ({"adapter_id": None}, "base"),
        ({"model": "a0", "adapter_id": None}, "a0"),
        ({"model": "a0", "adapter_id": ""}, "base"),
        ({"model": "a0", "adapter_id": "base"}, "base"),
    ]
    for fields, adapter in cases:
        reply = server.complete(**fields)
        shown = "base" if adapter == "base" else f"{adapter}@{revisions[adapter]}"
        assert reply.headers[ADAPTER_HEADER] == shown, fields
        assert reply.json()["choices"][0]["text"] == texts[adapter], fields
        assert reply.json()["model"] == fields.get("model", BASE)


def test_the_default_adapter_answers_for_the_base_id(server: Server) -> None:
    base, first = server.text(), server.text(model="a0")
    revision = server.client.get("/v1/adapters/a0").json()["active_revision"]
    try:
        set_reply = server.post("/v1/set_adapter", {"adapter": "a0"})
        assert set_reply.json() == {"adapter": "a0", "revision": revision}
        assert server.text() == first
        assert server.text(adapter_id="base") == base
        assert server.client.get("/v1/models/a0").json()["is_default"]
        pinned = server.post("/v1/set_adapter", {"adapter": f"a0@{revision}"})
        assert pinned.json() == {"adapter": "a0", "revision": revision}
        assert server.text() == first
        assert server.post("/v1/set_adapter", {"adapter": "nobody"}).status_code == 404
        assert server.text() == first
    finally:
        assert server.post("/v1/set_adapter", {"adapter": None}).json() == {"adapter": None, "revision": None}
    assert server.text() == base


def test_the_openai_client_understands_everything(server: Server) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [BASE, "a0", "a1"]
        assert client.models.retrieve("a0").id == "a0"
        raw = client.completions.with_raw_response.create(model="a0", prompt="the fox", max_tokens=4)
        assert raw.headers[ADAPTER_HEADER].startswith("a0@")
        assert raw.parse().usage.total_tokens == 8
        chat = client.chat.completions.create(model=BASE, messages=CHAT["messages"], max_tokens=4)
        assert chat.choices[0].finish_reason in {"stop", "length"}
        chunks = list(client.chat.completions.create(model=BASE, messages=CHAT["messages"], max_tokens=4, stream=True))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices[0].finish_reason in {"stop", "length"}


def test_tokens_there_and_back(server: Server) -> None:
    tokens = tiny_tokenizer()("the fox é☃").input_ids
    reply = server.post("/tokenize", {"model": "a0", "prompt": "the fox é☃"}).json()
    assert reply == {"count": len(tokens), "max_model_len": CONTEXT, "tokens": tokens, "token_strs": None}
    bare = server.post("/tokenize", {"prompt": "the fox é☃", "add_special_tokens": False}).json()["tokens"]
    assert bare == tokens[1:]
    assert server.post("/detokenize", {"model": BASE, "tokens": tokens}).json() == {"prompt": "<s>the fox é☃"}
    chat = server.post("/tokenize", {"messages": CHAT["messages"]}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": chat}).json()["prompt"] == "user: the fox\nassistant:"
