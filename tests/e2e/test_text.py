"""The demo model's tokenizer, 262,144 pieces with byte fallback: text that comes in pieces is the whole text."""

from __future__ import annotations

from os.path import commonprefix

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from serving.engine.detokenizer import Detokenizer
from vblora.integrations.base_models import BaseModel

TEXTS = [
    "The lighthouse keeper wrote:\n\n\t“naïve café ☕”",
    "日本語のテキスト, 한국어, ไทยก็",
    "👩‍👩‍👧‍👦 👍🏽 ❤️‍🔥 🏴󠁧󠁢󠁳󠁣󠁴󠁿 🇳🇴🇯🇵",
    "שלום עולם, مرحبا بالعالم \u202eabc\u202c",
    "e\u0301 a\u0308\u0323 Z\u0351\u036b\u0343",
    "𓀀𓁹 \U0001fae8 \U00012000 rare ones, spelled in bytes",
]


@pytest.fixture(scope="module")
def core(demo_base: BaseModel) -> Tokenizer:
    return demo_base.tokenizer.backend_tokenizer


def joined(core: Tokenizer, prompt: list[int], tokens: list[int], *, skip: bool = True) -> str:
    detokenizer = Detokenizer(core, prompt, skip_special_tokens=skip)
    return "".join(detokenizer.push(token) for token in tokens) + detokenizer.finish()


def answer_in_full(core: Tokenizer, prompt: list[int], tokens: list[int], *, skip: bool = True) -> str:
    before = core.decode(prompt, skip_special_tokens=skip)
    whole = core.decode([*prompt, *tokens], skip_special_tokens=skip)
    return whole[len(commonprefix([before, whole])) :]  # noqa: RUF071 - characters are what is meant


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_out_as_they_went_in(core: Tokenizer, text: str) -> None:
    prompt = core.encode("A prompt.\n").ids
    assert joined(core, prompt, core.encode(text, add_special_tokens=False).ids) == text
    spelled = [core.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    assert joined(core, prompt, spelled) == text


def test_any_tokens_give_what_a_full_decode_gives(core: Tokenizer) -> None:
    first_byte = core.token_to_id("<0x00>")
    one = st.one_of(st.integers(0, core.get_vocab_size() - 1), st.integers(first_byte, first_byte + 255))
    text = st.sampled_from(TEXTS).map(lambda text: core.encode(text, add_special_tokens=False).ids)
    tokens = st.one_of(st.lists(one, max_size=60), text)

    @settings(max_examples=500, derandomize=True, deadline=None, database=None)
    @given(tokens, tokens, st.integers(0, 30), st.booleans())
    def check(prompt: list[int], tokens: list[int], cut: int, skip: bool) -> None:
        prompt = prompt[: len(prompt) - cut]
        assert joined(core, prompt, tokens, skip=skip) == answer_in_full(core, prompt, tokens, skip=skip)

    check()
