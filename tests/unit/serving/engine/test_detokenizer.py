from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import cache
from os.path import commonprefix

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from serving.engine.detokenizer import Detokenizer
from tests.support import tiny_tokenizer

TEXTS = [
    "the quick brown fox",
    "naïve café ☕",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 family",
    "👍🏽 and 👍🏿, ❤️‍🔥, 🏴󠁧󠁢󠁳󠁣󠁴󠁿, 🇳🇴🇯🇵",
    "שלום עולם, مرحبا بالعالم \u202eabc\u202c",
    "e\u0301 a\u0308\u0323 ก็ नमस्ते Z\u0351\u036b\u0343",
    "  leading and trailing  ",
    "a\nb\tc",
    "a \ufffd of its own \ufffd",
]
PIECES = ["▁the", "▁quick", "▁", "a", "b", "▁▁", "ing", "▁☕", "☕", "é", "\u200d", "▁own", "\ufffd", "ab", "b▁"]


@cache
def byte_level() -> Tokenizer:
    return tiny_tokenizer().backend_tokenizer


def unigram(decoder: decoders.Decoder) -> Tokenizer:
    """All bytes as fallback tokens, some pieces of text, and `</s>`, `<tool>`: a special token and one that is not."""
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    core = Tokenizer(models.Unigram([(piece, -float(len(vocabulary))) for piece in vocabulary], 0, byte_fallback=True))
    core.decoder = decoder
    core.add_special_tokens([AddedToken("</s>", special=True)])
    core.add_tokens([AddedToken("<tool>", special=False)])
    return core


@cache
def stripped() -> Tokenizer:
    """As Llama's: pieces are joined, then one leading space is dropped."""
    return unigram(
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    )


@cache
def metaspace() -> Tokenizer:
    """As T5's: the first piece loses its spaces."""
    return unigram(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))


@cache
def wordpiece() -> Tokenizer:
    words = ["[UNK]", "[SEP]", "do", "not", "##ing", "##", "n't", ".", ",", "it", "##'s", "?", "'", "☕"]
    core = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece(cleanup=True)
    core.add_special_tokens(["[SEP]"])
    return core


@cache
def suffixed() -> Tokenizer:
    """As GPT's first: a word's last piece ends with `</w>`, which is a space unless nothing follows."""
    words = ["a", "b</w>", "the</w>", "☕", "</w>", "."]
    core = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    core.decoder = decoders.BPEDecoder("</w>")
    return core


@cache
def undecorated() -> Tokenizer:
    """No decoder at all: pieces are joined with spaces."""
    return Tokenizer(models.WordLevel({"a": 0, "b": 1, "☕": 2}, unk_token="a"))


BUILDERS: list[Callable[[], Tokenizer]] = [byte_level, stripped, metaspace, wordpiece, suffixed, undecorated]


def encode(text: str) -> list[int]:
    return list(tiny_tokenizer().encode(text, add_special_tokens=False))


def spelled(core: Tokenizer, text: str) -> list[int]:
    """Tokens of one byte each, as far as the tokenizer has any."""
    ((alphabet, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    names = alphabet if core is byte_level() else [f"<0x{byte:02X}>" for byte in text.encode()]
    return [token for name in names if (token := core.token_to_id(name)) is not None]


def fallback(data: bytes) -> list[int]:
    return [stripped().token_to_id(f"<0x{byte:02X}>") for byte in data]


def named(core: Tokenizer, *names: str) -> list[int]:
    return [core.token_to_id(name) for name in names]


def pieces(detokenizer: Detokenizer, tokens: Sequence[int]) -> list[str]:
    found = []
    for token in tokens:
        found.append(detokenizer.push(token))
        if detokenizer.stopped:
            return found
    return [*found, detokenizer.finish()]


def joined(detokenizer: Detokenizer, tokens: Sequence[int]) -> str:
    return "".join(pieces(detokenizer, tokens))


def answer_in_full(core: Tokenizer, prompt: Sequence[int], tokens: Sequence[int], *, skip: bool = True) -> str:
    """The text of `tokens` after all of `prompt`, by decoding everything at once."""
    before = core.decode(list(prompt), skip_special_tokens=skip)
    whole = core.decode([*prompt, *tokens], skip_special_tokens=skip)
    return whole[len(commonprefix([before, whole])) :]  # noqa: RUF071 - characters are what is meant


def ids(core: Tokenizer, most: int) -> st.SearchStrategy[list[int]]:
    """Tokens of all kinds, and often whole characters that are spelled out in bytes."""
    any_id = st.integers(0, core.get_vocab_size() + 2).map(lambda token: [token])
    whole = st.sampled_from(["☕", "é", "👍🏽", "\n", "a", " "]).map(lambda text: spelled(core, text))
    part = st.one_of(any_id, whole, whole.map(lambda tokens: tokens[:-1]))
    return st.lists(part, max_size=most).map(lambda parts: [token for tokens in parts for token in tokens])


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(text: str) -> None:
    assert joined(Detokenizer(byte_level()), encode(text)) == text
    assert joined(Detokenizer(stripped()), spelled(stripped(), text)) == text.removeprefix(" ")
    assert joined(Detokenizer(byte_level()), spelled(byte_level(), text)) == text


@pytest.mark.parametrize("build", BUILDERS)
@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_any_tokens_after_any_prompt_give_what_a_full_decode_gives(
    build: Callable[[], Tokenizer], data: st.DataObject
) -> None:
    core = build()
    prompt, tokens = data.draw(ids(core, 12)), data.draw(ids(core, 40))
    skip = data.draw(st.booleans())
    found = pieces(Detokenizer(core, prompt, skip_special_tokens=skip), tokens)
    assert "".join(found) == answer_in_full(core, prompt, tokens, skip=skip)
    for piece in found:
        assert json.loads(json.dumps(piece)) == piece.encode().decode()


@pytest.mark.parametrize("build", BUILDERS)
@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_any_stop_strings_end_the_text_where_a_full_decode_has_the_first(
    build: Callable[[], Tokenizer], data: st.DataObject
) -> None:
    core = build()
    prompt, tokens = data.draw(ids(core, 3)), data.draw(ids(core, 30))
    assume(not core.decode(prompt).endswith("\ufffd"))
    alphabet = sorted(set(answer_in_full(core, prompt, tokens)) - {"\ufffd"} | {"a"})
    stops = data.draw(st.lists(st.text(alphabet, min_size=1, max_size=3), min_size=1, max_size=4))
    include = data.draw(st.booleans())
    detokenizer = Detokenizer(core, prompt, stop=stops, include_stop=include)
    text, taken = "", 0
    while taken < len(tokens) and not detokenizer.stopped:
        text += detokenizer.push(tokens[taken])
        taken += 1
    text += detokenizer.finish()
    whole = answer_in_full(core, prompt, tokens[:taken])
    assert text == cut(whole, stops, include=include)
    assert detokenizer.stopped == any(stop in whole for stop in stops)
    if taken:
        before = answer_in_full(core, prompt, tokens[: taken - 1])
        assert not any(stop in before for stop in stops), "it went on after a stop string"


def cut(text: str, stops: Sequence[str], *, include: bool) -> str:
    """`text` up to its first stop string; of two that begin together the shorter one."""
    found = [(start, start + len(stop)) for stop in stops if (start := text.find(stop)) >= 0]
    return text[: min(found)[include]] if found else text


def test_no_piece_shows_half_a_character() -> None:
    for core in (byte_level(), stripped(), metaspace()):
        found = pieces(Detokenizer(core), [*spelled(core, "☕👍🏽"), *spelled(core, "é")])
        assert not any("\ufffd" in piece for piece in found)


def test_characters_come_as_soon_as_they_are_whole() -> None:
    assert pieces(Detokenizer(byte_level()), spelled(byte_level(), "☕é")) == ["", "", "☕", "", "é", ""]
    assert pieces(Detokenizer(stripped()), [*fallback("☕é".encode()), *named(stripped(), "a")])[-2:] == ["☕éa", ""]


def test_bytes_that_are_no_text_are_replaced_where_they_stand() -> None:
    broken = [*fallback(b"\xe2\x98"), *named(stripped(), "a"), *fallback("☕".encode()), *named(stripped(), "b")]
    assert joined(Detokenizer(stripped()), broken) == "\ufffd\ufffda☕b"
    assert joined(Detokenizer(stripped()), [*named(stripped(), "a"), *fallback(b"\xe2\x98")]) == "a\ufffd\ufffd"
    spoilt = [*fallback("☕".encode() + b"\xff"), *named(stripped(), "a")]
    assert joined(Detokenizer(stripped()), spoilt) == "\ufffd" * 4 + "a"
    cup = spelled(byte_level(), "☕")
    assert joined(Detokenizer(byte_level()), [*cup[:2], *encode("a"), *cup]) == "\ufffda☕"
    assert joined(Detokenizer(byte_level()), [*encode("a"), *cup[:2]]) == "a\ufffd"


def test_a_prompt_that_ends_inside_a_character_is_not_repeated() -> None:
    prompt = encode("cup ☕")
    assert joined(Detokenizer(byte_level(), prompt[:-1]), encode(" of tea")) == " of tea"
    assert joined(Detokenizer(byte_level(), prompt[:-1]), [prompt[-1], *encode(" of tea")]) == "☕ of tea"
    prompt = [*named(stripped(), "▁the"), *fallback("☕".encode())]
    assert joined(Detokenizer(stripped(), prompt[:-1]), [prompt[-1], *named(stripped(), "a")]) == "☕a"
    assert joined(Detokenizer(stripped(), prompt[:-1]), named(stripped(), "a")) == "a"


def test_the_first_word_keeps_its_space_after_a_prompt() -> None:
    for core in (stripped(), metaspace()):
        tokens = named(core, "▁the", "▁quick")
        assert joined(Detokenizer(core), tokens) == "the quick"
        assert joined(Detokenizer(core, tokens), tokens) == " the quick"
        assert joined(Detokenizer(core, [*tokens, *named(core, "</s>") * 20]), tokens) == " the quick"
    assert joined(Detokenizer(wordpiece(), named(wordpiece(), "it")), named(wordpiece(), "do", "n't", ".")) == " don't."
    assert joined(Detokenizer(suffixed(), named(suffixed(), "b</w>")), named(suffixed(), "a")) == " a"


def test_special_tokens_are_shown_only_when_asked_for() -> None:
    tokens = [*encode("a"), tiny_tokenizer().eos_token_id, *encode("b")]
    assert joined(Detokenizer(byte_level()), tokens) == "ab"
    assert joined(Detokenizer(byte_level(), skip_special_tokens=False), tokens) == "a</s>b"
    inside = [*fallback(b"\xe2\x98"), *named(stripped(), "</s>"), *fallback(b"\x95"), *named(stripped(), "<tool>")]
    assert joined(Detokenizer(stripped()), inside) == "☕<tool>"
    assert joined(Detokenizer(stripped(), skip_special_tokens=False), inside) == "\ufffd\ufffd</s>\ufffd<tool>"


@pytest.mark.parametrize(
    ("text", "stops", "before", "with_it"),
    [
        ("the quick brown fox", ("brown", "zebra"), "the quick ", "the quick brown"),
        ("the quick brown fox", ("fox", "quick"), "the ", "the quick"),
        ("the quick brown fox", ("k b", "ick"), "the qu", "the quick"),
        ("aaab", ("aab",), "a", "aaab"),
        ("ababac!", ("abac",), "ab", "ababac"),
        ("abcde", ("cd", "abx"), "ab", "abcd"),
        ("the end", ("the end",), "", "the end"),
        ("x☕👍🏽y", ("👍",), "x☕", "x☕👍"),
        ("one\n\ntwo", ("\n\n",), "one", "one\n\n"),
        ("a\u0301b", ("\u0301",), "a", "a\u0301"),
        ("no stop", ("stopp", "!"), "no stop", "no stop"),
    ],
)
def test_stop_strings(text: str, stops: tuple[str, ...], before: str, with_it: str) -> None:
    for core, tokens in [
        (byte_level(), encode(text)),
        (byte_level(), spelled(byte_level(), text)),
        (stripped(), spelled(stripped(), text)),
    ]:
        assert joined(Detokenizer(core, stop=stops), tokens) == before
        detokenizer = Detokenizer(core, stop=stops, include_stop=True)
        assert joined(detokenizer, tokens) == with_it
        assert detokenizer.finish() == ""


def test_nothing_follows_a_stop_string() -> None:
    detokenizer = Detokenizer(byte_level(), stop=("brown",))
    assert joined(detokenizer, encode("the quick brown fox")) == "the quick "
    assert detokenizer.stopped
    assert [detokenizer.push(token) for token in encode(" jumps")] == [""] * len(encode(" jumps"))
    assert detokenizer.finish() == ""


def test_a_stop_string_that_ends_inside_a_token() -> None:
    brown = encode(" brown fox")[0]
    assert byte_level().decode([brown]) == " b"
    assert joined(Detokenizer(byte_level(), stop=(" ",)), [*encode("quick"), brown]) == "quick"
    assert joined(Detokenizer(byte_level(), stop=(" ",), include_stop=True), [*encode("quick"), brown]) == "quick "


def test_a_stop_string_in_bytes_ends_the_text_with_its_last_byte() -> None:
    """A newline is a fallback byte for Llama's tokenizers: one token more would be one too many."""
    for stop, tokens in [("\n", b"\n"), ("\n\n", b"\n\n"), ("☕", "☕".encode()), ("k\n", b"k\n")]:
        detokenizer = Detokenizer(stripped(), stop=(stop,))
        detokenizer.push(stripped().token_to_id("▁quick"))
        for token in fallback(tokens):
            assert not detokenizer.stopped
            detokenizer.push(token)
        assert detokenizer.stopped
    detokenizer = Detokenizer(stripped(), stop=("b\n",))
    found = [detokenizer.push(token) for token in [*fallback(b"a\n"), *named(stripped(), "b"), *fallback(b"\n")]]
    assert "".join(found) == "a\n"
    assert detokenizer.stopped


def test_a_stop_string_that_wrong_bytes_undo_is_none() -> None:
    detokenizer = Detokenizer(stripped(), stop=(" a",))  # the first space of a text is dropped
    assert joined(detokenizer, fallback(b" ab")) == "ab"
    assert joined(Detokenizer(stripped(), stop=("b",)), fallback(b"a\xffb")) == "\ufffd" * 3


def test_what_may_become_a_stop_string_is_held_back_and_given_at_the_end() -> None:
    detokenizer = Detokenizer(byte_level(), stop=("fox jumps",))
    found = pieces(detokenizer, encode("the quick brown fox"))
    assert "".join(found[:-1]) == "the quick brown "
    assert found[-1] == "fox"
    assert not detokenizer.stopped


@pytest.mark.parametrize(
    ("tokens", "stop"),
    [
        (b"a", "a" * 20_000 + "b"),
        (b"\n", "\n" * 20_000 + "b"),
        (b"\xff", "b"),
        (b"ab", "ba" * 20_000),
    ],
)
def test_the_time_of_a_token_does_not_grow_with_the_text(tokens: bytes, stop: str) -> None:
    for core, part in [
        (stripped(), fallback(tokens)),
        (byte_level(), [3 + 30, 255]),
        (byte_level(), [tiny_tokenizer().eos_token_id]),
    ]:
        detokenizer = Detokenizer(core, stop=(stop,))
        whole = part * (8000 // len(part))
        started = time.process_time()
        text = joined(detokenizer, whole)
        assert time.process_time() - started < 2
        assert text == core.decode(whole)
