from __future__ import annotations

import random

import pytest

from serving.engine.detokenizer import Detokenizer
from tests.support import tiny_tokenizer

TEXTS = [
    "the quick brown fox",
    "naïve café ☕",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 family",
    "  leading and trailing  ",
    "a\nb\tc",
]


def core() -> object:
    return tiny_tokenizer().backend_tokenizer


def encode(text: str) -> list[int]:
    return list(tiny_tokenizer().encode(text, add_special_tokens=False))


def pieces(detokenizer: Detokenizer, tokens: list[int]) -> list[str]:
    found = []
    for token in tokens:
        found.append(detokenizer.push(token))
        if detokenizer.stopped:
            return found
    return [*found, detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(text: str) -> None:
    assert "".join(pieces(Detokenizer(core()), encode(text))) == text


def test_no_piece_shows_half_a_character() -> None:
    found = pieces(Detokenizer(core()), encode("☕☕"))
    assert not any("\ufffd" in piece for piece in found)


def test_random_tokens_give_what_a_full_decode_gives() -> None:
    draw = random.Random(5)
    for _ in range(200):
        tokens = [draw.randrange(3, 300) for _ in range(draw.randrange(1, 30))]
        assert "".join(pieces(Detokenizer(core()), tokens)) == tiny_tokenizer().decode(tokens)


def test_random_tokens_after_a_prompt_continue_it() -> None:
    draw = random.Random(6)
    prompt = encode("the prompt")
    for _ in range(200):
        tokens = [draw.randrange(3, 300) for _ in range(draw.randrange(1, 30))]
        whole = tiny_tokenizer().decode(prompt + tokens)
        assert "the prompt" + "".join(pieces(Detokenizer(core(), prompt), tokens)) == whole


def test_a_prompt_that_ends_inside_a_character_is_not_repeated() -> None:
    prompt = encode("cup ☕")[:-1]
    assert "cup" not in "".join(pieces(Detokenizer(core(), prompt), encode(" of tea")))


def test_a_stop_string_over_several_tokens_ends_the_text_before_it() -> None:
    detokenizer = Detokenizer(core(), stop=("brown", "zebra"))
    assert "".join(pieces(detokenizer, encode("the quick brown fox"))) == "the quick "
    assert detokenizer.stopped
    assert detokenizer.finish() == ""


def test_the_first_stop_string_in_the_text_counts() -> None:
    detokenizer = Detokenizer(core(), stop=("fox", "quick"))
    assert "".join(pieces(detokenizer, encode("the quick brown fox"))) == "the "


def test_what_may_become_a_stop_string_is_held_back_and_given_at_the_end() -> None:
    detokenizer = Detokenizer(core(), stop=("fox jumps",))
    found = pieces(detokenizer, encode("the quick brown fox"))
    assert "".join(found[:-1]) == "the quick brown "
    assert found[-1] == "fox"


def test_special_tokens_are_shown_only_when_asked_for() -> None:
    tokens = [*encode("a"), tiny_tokenizer().eos_token_id, *encode("b")]
    assert "".join(pieces(Detokenizer(core()), tokens)) == "ab"
    assert "".join(pieces(Detokenizer(core(), skip_special_tokens=False), tokens)) == "a</s>b"
