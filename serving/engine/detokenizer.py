"""Tokens → text as they come, and the end of a text at a stop string. Knows one request, no batch.

The pieces join to what one decode of everything gives. Let `before` be the text of the prompt's end and `whole` that
of the prompt's end and all generated tokens, both by `Tokenizer.decode`: the pieces join to `whole` without the
beginning that it has in common with `before`. That beginning is all of `before`, unless the prompt ends inside a
character and the answer goes on with it: then the character is the answer's, and with byte fallback the row of bytes
it is in. The whole prompt would give the same as its end. All of this holds for decoders that change nothing they
have written but unfinished bytes at the end: byte-level, byte fallback, Metaspace, WordPiece, Strip, BPE.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from copy import copy
from functools import lru_cache

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 8  # more bytes than two characters have: what follows no longer depends on what came before
_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer:
    """The text of one request's generated tokens.

    Held back is what later tokens may change: an unfinished character, a row of byte-fallback tokens (one wrong byte
    spoils all of it), and what may be the beginning of a stop string. The text ends before the first stop string, or
    behind it with `include_stop`; of several that come with the same token the one that begins first counts.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stops = _StopStrings(stop, include_stop)
        self._trial: _StopStrings | None = None  # has also read the row of bytes at the end
        self._window = self._end_of(prompt)
        self._shown = self._decode(self._window)  # the part of the window's text that is told
        self._row = _ByteRow()
        for token in self._window:
            self._read_byte(token)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been found."""
        return self._stops.found

    def push(self, token: int) -> str:
        """Take the next token; return the text that is now certain."""
        if self.stopped or not _is_visible(self._tokenizer, token, self._skip):
            return ""
        self._window.append(token)
        characters = self._read_byte(token)
        if characters is not None:
            return self._try(characters)
        self._trial = None
        certain = self._decode(self._window).removesuffix(REPLACEMENT)
        text = self._stops.feed(self._tell(certain))
        if len(self._window) >= 2 * CONTEXT_TOKENS and certain == self._shown:
            self._shorten()
        return text

    def finish(self) -> str:
        """The rest of the text at its end: what was held back, and what bytes of an unfinished character leave."""
        return "" if self.stopped else self._settle() + self._stops.give_up()

    def _read_byte(self, token: int) -> str | None:
        """The characters that a byte-fallback token completes, None for other tokens."""
        byte = self._fallback_byte(token)
        if byte is None:
            self._row = _ByteRow()
            return None
        return self._row.read(byte)

    def _try(self, characters: str) -> str:
        """Text in a row of bytes is not certain before the row ends, but a stop string in it ends the text at once."""
        if self._trial is None:
            self._trial = copy(self._stops)
        self._trial.feed(characters)
        if not self._trial.found:
            return ""
        self._trial = copy(self._stops)
        self._trial.feed(self._new_in(self._decode(self._window)))
        return self._settle() if self._trial.found else ""

    def _settle(self) -> str:
        """The text up to here, as if nothing followed."""
        return self._stops.feed(self._tell(self._decode(self._window)))

    def _tell(self, certain: str) -> str:
        """What is new in `certain`, the beginning of the window's text that no token can change any more."""
        new = self._new_in(certain)
        if new:
            self._shown = certain
        return new

    def _new_in(self, text: str) -> str:
        return text[_common(text, self._shown) :]

    def _shorten(self) -> None:
        """Forget tokens whose text is told, unless that would change how the next one is decoded: a decoder may treat
        the first text of all in its own way, so some must stay."""
        window = self._window[-CONTEXT_TOKENS:]
        if shown := self._decode(window).removesuffix(REPLACEMENT):
            self._window, self._shown = window, shown

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """So much of the prompt that more would not change the answer: some text, and no row of bytes cut in two."""
        size = CONTEXT_TOKENS
        while True:
            end = [token for token in prompt[-size:] if _is_visible(self._tokenizer, token, self._skip)]
            whole = len(end) >= CONTEXT_TOKENS and self._fallback_byte(end[0]) is None and self._decode(end)
            if whole or size >= len(prompt):
                return end
            size *= 2

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._skip))

    def _fallback_byte(self, token: int) -> int | None:
        match = _FALLBACK_BYTE.fullmatch(self._tokenizer.id_to_token(token) or "")
        return int(match[1], 16) if match else None


@lru_cache(maxsize=65_536)
def _is_visible(tokenizer: Tokenizer, token: int, skip_special: bool) -> bool:
    """False for what decoding leaves out: skipped special tokens, and ids that the tokenizer does not know."""
    if tokenizer.id_to_token(token) is None:
        return False
    return not skip_special or bool(tokenizer.decode([token]) or not tokenizer.decode([token], False))


def _common(first: str, second: str) -> int:
    """How many characters both begin with."""
    if first.startswith(second):
        return len(second)
    pairs = zip(first, second, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), len(first))


class _ByteRow:
    """Byte-fallback tokens one after another, read as UTF-8."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._spoilt = False

    def read(self, byte: int) -> str:
        """The character that this byte completes, if it does and no byte before it was wrong."""
        try:
            return "" if self._spoilt else self._decoder.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._spoilt = True
            return ""


class _StopStrings:
    """Passes text on up to the first of the stop strings, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._matches = [_Match(stop) for stop in stops]
        self._include = include
        self._held = ""
        self.found = False

    def __copy__(self) -> _StopStrings:
        other = _StopStrings((), self._include)
        other._matches = [copy(match) for match in self._matches]
        other._held, other.found = self._held, self.found
        return other

    def feed(self, text: str) -> str:
        """Take more text; return what is certainly before a stop string, or up to the end of one."""
        if not self._matches or not text:
            return text
        begin = len(self._held)
        self._held += text
        ends = [(end - len(match.text), end) for match in self._matches if (end := match.find(self._held, begin))]
        if ends:
            start, end = min(ends)
            self.found = True
            return self._give(end if self._include else start, forget=True)
        return self._give(len(self._held) - max(match.length for match in self._matches))

    def give_up(self) -> str:
        """What was held back, now that nothing follows."""
        return self._give(len(self._held))

    def _give(self, size: int, *, forget: bool = False) -> str:
        text, self._held = self._held[:size], "" if forget else self._held[size:]
        return text


class _Match:
    """How much of one stop string the text ends with, by Knuth, Morris and Pratt's method: the time is that of the
    text's length, whatever the two repeat. `_borders[i]` is the size of the longest proper prefix of the first i
    characters that is a suffix of them too; it is filled as far as the text has matched."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = 0
        self._borders = [0, 0]

    def find(self, text: str, begin: int) -> int:
        """Read `text` from `begin` on; returns where the stop string ends, 0 if it does not."""
        for position in range(begin, len(text)):
            self.length = self._next(self.length, text[position])
            if self.length == len(self.text):
                return position + 1
            if self.length == len(self._borders):
                self._borders.append(self._next(self._borders[-1], text[position]))
        return 0

    def _next(self, length: int, character: str) -> int:
        while length and self.text[length] != character:
            length = self._borders[length]
        return length + (self.text[length] == character)
