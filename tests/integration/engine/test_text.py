"""Text as the engine's events carry it: any model's tokens, however they spell characters, and any stop strings."""

from __future__ import annotations

import json
import re

import pytest

from serving.engine import Engine
from serving.types import GenerationEvent, GenerationRequest, SamplingParams
from tests.support import tiny_tokenizer

PROMPT = tuple(tiny_tokenizer().encode("the fox"))
HOT = {"temperature": 1.5, "ignore_eos": True}


def events(engine: Engine, **sampling: object) -> list[GenerationEvent]:
    params = SamplingParams(**{"max_tokens": 60, "seed": 0, **HOT, **sampling})  # type: ignore[arg-type]
    return list(engine.stream(GenerationRequest("r", "tenant", PROMPT, params)))


def tokens_of(found: list[GenerationEvent]) -> list[int]:
    return [token for event in found for token in event.token_ids]


def text_of(found: list[GenerationEvent]) -> str:
    return "".join(event.text for event in found)


def decoded(tokens: list[int], *, skip: bool = True) -> str:
    """What one decode of the prompt and the answer says after the prompt."""
    before = tiny_tokenizer().decode(PROMPT, skip_special_tokens=skip)
    return str(tiny_tokenizer().decode([*PROMPT, *tokens], skip_special_tokens=skip)).removeprefix(before)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_the_pieces_of_a_random_answer_join_to_its_text(engine: Engine, seed: int, skip: bool) -> None:
    found = events(engine, seed=seed, skip_special_tokens=skip)
    assert text_of(found) == decoded(tokens_of(found), skip=skip)
    assert any("\ufffd" in event.text for event in found), "a random model writes bytes that are no text"


def test_every_piece_survives_json_and_utf_8(engine: Engine) -> None:
    """What the stream sends: no half of a surrogate pair, no piece that cannot be written."""
    coffee = tiny_tokenizer().encode("👍🏽☕", add_special_tokens=False)
    bias = tuple((token, 30.0) for token in set(coffee))
    found = events(engine, logit_bias=bias, temperature=1.0, max_tokens=120)
    assert set(tokens_of(found)) <= set(coffee)
    for event in found:
        assert json.loads(json.dumps(event.text)) == event.text.encode().decode()


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_an_answer_ends_at_its_first_stop_string(engine: Engine, seed: int, include: bool) -> None:
    whole = text_of(events(engine, seed=seed))
    readable = re.findall(r"[^\ufffd]{2,3}", whole)
    stops = (readable[2], readable[1], "never said")
    found = events(engine, seed=seed, stop=stops, include_stop_str_in_output=include)
    text = text_of(found)
    start, end = min((at, at + len(stop)) for stop in stops if (at := whole.find(stop)) >= 0)
    assert text == whole[: end if include else start]
    assert found[-1].finish_reason == "stop"
    assert not any(stop in decoded(tokens_of(found)[:-1]) for stop in stops)


def test_a_stop_token_is_shown_only_when_asked_for(engine: Engine) -> None:
    tokens = tokens_of(events(engine))
    last = next(token for token in tokens[5:] if token > 2)
    hidden = events(engine, stop_token_ids=(last,))
    shown = events(engine, stop_token_ids=(last,), include_stop_str_in_output=True)
    assert tokens_of(hidden) == tokens_of(shown)
    assert text_of(shown) == decoded(tokens_of(shown))
    assert text_of(hidden) == decoded(tokens_of(hidden)[:-1])
