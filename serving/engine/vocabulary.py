"""The base model's tokens as bytes, for answers that must match a structure. Knows no requests and no grammars."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from llguidance import LLTokenizer, TokenizerWrapper
from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_BOUNDARY = "▁"  # sentencepiece's mark of a space


class Pieces:
    """Tokens as llguidance asks for them. It needs a text's tokens only to force them, which no grammar here does."""

    eos_token_id = 0  # given apart, for there may be several
    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int]) -> None:
        self.tokens = tokens
        self.special_token_ids = special

    def __call__(self, text: bytes) -> list[int]:
        return []


class Vocabulary:
    """The tokens of a tokenizer. `size` is the number of logits of the model, which may exceed the tokenizer's tokens;
    `end_of_text` are the tokens that end a text.

    Thread-safe. What takes seconds and memory is built when it is first asked for: see `matching`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int, end_of_text: frozenset[int]) -> None:
        self.size = size
        self.num_tokens = len(tokenizer)
        self.end_of_text = sorted(token for token in end_of_text if token < self.num_tokens)
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._matching: LLTokenizer | None = None

    @property
    def matching(self) -> LLTokenizer:
        """The tokens as a tree, which masks are computed on. 262,144 of them take a second and 50 MB, once; meanwhile
        no other thread runs."""
        with self._lock:
            if self._matching is None:
                wrapper = TokenizerWrapper(Pieces(self.pieces(), self.special))
                self._matching = LLTokenizer(wrapper, n_vocab=self.num_tokens, eos_token=self.end_of_text)
            return self._matching

    def pieces(self) -> list[bytes]:
        """`token_bytes` of every token."""
        return [self.token_bytes(token) for token in range(self.num_tokens)]

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to a text, which need not be whole characters: a special token its name, an id outside
        the tokenizer nothing."""
        if not 0 <= token < self.num_tokens:
            return b""
        if (added := self._added.get(token)) is not None:
            return added.encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        return self._piece_bytes(piece) if isinstance(piece, str) else b""

    def single(self, text: str) -> int | None:
        """The token that was added to the tokenizer for exactly this text and is shown in answers, if there is one."""
        return next(
            (token for token, added in self._added.items() if added == text and token not in self.special), None
        )

    @cached_property
    def special(self) -> list[int]:
        """The tokens that no text of an answer holds, the ends of text among them."""
        added = self._tokenizer.added_tokens_decoder.items()
        return sorted({int(token) for token, piece in added if piece.special}.union(self.end_of_text))

    def _piece_bytes(self, piece: str) -> bytes:
        if self._byte_level:
            return bytes(_BYTES.get(character, 0x20) for character in piece)
        if byte := _BYTE_TOKEN.fullmatch(piece):
            return bytes.fromhex(byte[1])
        return piece.replace(_WORD_BOUNDARY, " ").encode()

    @cached_property
    def _added(self) -> dict[int, str]:
        return {int(token): added.content for token, added in self._tokenizer.added_tokens_decoder.items()}

    @cached_property
    def _byte_level(self) -> bool:
        """Whether the characters of tokens stand for bytes, as in GPT-2."""
        decoder = self._tokenizer.backend_tokenizer.decoder
        return decoder is not None and "ByteLevel" in _types(json.loads(decoder.__getstate__()))


def _types(decoder: dict[str, Any]) -> set[str]:
    """The kinds of a decoder and of those it is made of."""
    return {str(decoder["type"])}.union(*(_types(part) for part in decoder.get("decoders", ())))


def _byte_characters() -> dict[str, int]:
    """Which byte a character of a byte-level token stands for: printable ones of Latin-1 for themselves, the others
    for the 68 bytes left, in order (GPT-2's encoder)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_characters()
