from __future__ import annotations

import copy

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AddedToken, PreTrainedTokenizerFast

from serving.engine.vocabulary import Vocabulary
from tests.support import VOCAB_SIZE, tiny_tokenizer

ENDS = frozenset({1})


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Pieces with ▁ for a space and tokens for all bytes, as Llama's and Gemma's."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁", "é", "▁a▁b"]
    core = Tokenizer(models.BPE({piece: token for token, piece in enumerate(pieces)}, [], byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def test_bytes_of_byte_level_tokens_put_together_are_the_text() -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = Vocabulary(tokenizer, VOCAB_SIZE, ENDS)
    text = "the restaurant: “naïve” \x00\t\n 東京 🦜 <s>"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(vocabulary.token_bytes, tokens)) == text.encode()


def test_every_byte_has_a_byte_level_token() -> None:
    pieces = Vocabulary(tiny_tokenizer(), VOCAB_SIZE, ENDS).pieces()
    assert {bytes([byte]) for byte in range(256)} <= set(pieces)


def test_bytes_of_sentencepiece_tokens() -> None:
    tokenizer = sentencepiece_tokenizer()
    vocabulary = Vocabulary(tokenizer, 300, ENDS)
    assert [vocabulary.token_bytes(2 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    known = tokenizer.get_vocab()
    found = [vocabulary.token_bytes(known[name]) for name in ("▁the", "▁", "é", "▁a▁b", "</s>")]
    assert found == [b" the", b" ", "é".encode(), b" a b", b"</s>"]


def test_ids_outside_the_tokenizer_add_nothing() -> None:
    vocabulary = Vocabulary(tiny_tokenizer(), VOCAB_SIZE + 64, ENDS)
    assert [vocabulary.token_bytes(token) for token in (VOCAB_SIZE, VOCAB_SIZE + 63, 10**9, -1)] == [b""] * 4


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), sentencepiece_tokenizer()], ids=["bytes", "sentencepiece"])
def test_llguidance_reads_the_same_bytes_from_the_tokenizer_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    from llguidance.hf import from_tokenizer

    vocabulary, theirs = Vocabulary(tokenizer, len(tokenizer), ENDS), from_tokenizer(tokenizer)
    for token in range(len(tokenizer)):
        if (own := vocabulary.token_bytes(token)) != b"\xff":  # which llguidance keeps for itself: no text holds it
            assert own == theirs.decode_bytes([token])


def test_the_tree_is_built_once_and_knows_all_ends_of_text() -> None:
    vocabulary = Vocabulary(tiny_tokenizer(), VOCAB_SIZE, frozenset({2, 1, 5000}))
    assert vocabulary.matching is vocabulary.matching
    assert sorted(vocabulary.matching.eos_tokens) == [1, 2] and vocabulary.matching.vocab_size == VOCAB_SIZE


def test_a_text_that_is_one_token() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("<hidden>", special=True)])
    vocabulary = Vocabulary(tokenizer, 320, ENDS)
    assert vocabulary.single("<tool_call>") == VOCAB_SIZE
    assert vocabulary.token_bytes(VOCAB_SIZE) == b"<tool_call>"
    assert vocabulary.single("<hidden>") is None and vocabulary.single("</s>") is None
    assert vocabulary.single("</tool_call>") is None
