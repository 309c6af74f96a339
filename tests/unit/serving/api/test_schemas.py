from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from serving.api.schemas import ChatBody, CompletionBody
from serving.types import Message, SamplingParams


def body(**fields: Any) -> CompletionBody:
    return CompletionBody.model_validate({"model": "m", "prompt": "p", **fields})


def test_nothing_set_means_the_defaults() -> None:
    assert body().sampling(16) == SamplingParams(max_tokens=16)
    nulls = {name: None for name in CompletionBody.model_fields if name not in ("model", "prompt")}
    assert body(**nulls) == body()


def test_everything_set_reaches_the_sampler() -> None:
    fields = {
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.4,
        "min_p": 0.1,
        "seed": 3,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "ignore_eos": True,
        "min_tokens": 2,
        "skip_special_tokens": False,
    }
    params = body(**fields, stop="x", stop_token_ids=[1, 2], logit_bias={"7": -100}).sampling(9)
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.max_tokens, params.stop, params.stop_token_ids) == (9, ("x",), (1, 2))
    assert params.logit_bias == ((7, -100.0),)


def test_values_that_mean_the_same_to_the_sampler() -> None:
    assert body(top_k=-1).sampling(1).top_k == 0
    assert body(temperature=1e-9).sampling(1).temperature == 0
    assert body(temperature=0).sampling(1).temperature == 0


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert body(max_tokens=3, max_completion_tokens=4).requested_tokens == 4
    assert body(max_tokens=3).requested_tokens == 3
    assert body().requested_tokens is None


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_kinds_of_prompts(prompt: Any, expected: Any) -> None:
    assert body(prompt=prompt).prompt == expected


def test_messages_are_plain_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = ChatBody.model_validate(
        {"model": "m", "messages": [{"role": "developer", "content": parts}, {"role": "user", "content": ""}]}
    )
    assert [message.message() for message in chat.messages] == [Message("system", "ab"), Message("user", "")]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
@pytest.mark.parametrize("field", ["temperature", "min_p", "frequency_penalty", "repetition_penalty"])
def test_numbers_are_finite(field: str, value: float) -> None:
    with pytest.raises(ValidationError):
        body(**{field: value})
