from __future__ import annotations

import json

import pytest

from serving.api.body import parse_body, parse_json
from serving.api.context import Caps
from serving.api.schemas import CompletionBody
from serving.errors import InvalidValue


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": [-Infinity]}', "-Infinity is not a number"),
        (b"\xff", "not UTF-8"),
        ("\ufeff{}".encode(), "not valid JSON"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5_000 + b"}", "not valid JSON"),
    ],
)
def test_what_is_no_json_object_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(InvalidValue, match=words):
        parse_json(raw)


@pytest.mark.parametrize(
    ("raw", "param"),
    [(rb'{"a": "\ud800"}', "a"), (rb'{"a": [{"b": "x\udc00"}]}', "a.0.b"), (rb'{"\ud800": 1}', "?")],
)
def test_lone_surrogates_are_refused_with_their_place(raw: bytes, param: str) -> None:
    with pytest.raises(InvalidValue, match="lone surrogate") as caught:
        parse_json(raw)
    assert caught.value.param == param
    caught.value.message.encode()


def test_other_escapes_are_text() -> None:
    assert parse_json(rb'{"a": "\u00e9\ud83d\ude00", "b": "\\ud800"}') == {"a": "é😀", "b": r"\ud800"}


def test_the_context_sets_the_caps() -> None:
    raw = json.dumps({"model": "m", "prompt": ["a", "b"]}).encode()
    assert parse_body(CompletionBody, raw, context=Caps()).prompt == ("a", "b")
    with pytest.raises(InvalidValue, match="prompt: at most 1 entries") as caught:
        parse_body(CompletionBody, raw, context=Caps(prompts=1))
    assert caught.value.param == "prompt"
