"""Tokens → text as they come, and the end of a text at a stop string. Knows one request, no batch."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6  # of the prompt, so that the first token keeps its leading space


class Detokenizer:
    """The text of one request's generated tokens.

    Text that could be the beginning of a stop string is held back until it is known not to be. A stop string itself
    and what follows it are never part of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context = self._whole_characters(prompt)
        self._stream = self._new_stream()
        self._pending: list[int] = []  # tokens whose text the stream has not given yet
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def _whole_characters(self, prompt: Sequence[int]) -> list[int]:
        """The end of the prompt, if it ends with a whole character and says something."""
        context = list(prompt[-CONTEXT_TOKENS:])
        text = self._tokenizer.decode(context, skip_special_tokens=self._skip)
        return context if text and not text.endswith(REPLACEMENT) else []

    def _new_stream(self) -> DecodeStream:
        return DecodeStream(ids=self._context, skip_special_tokens=self._skip)

    def push(self, token: int) -> str:
        """Take the next token; return the text that is now certain."""
        self._pending.append(token)
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:  # DecodeStream raises a bare Exception, "Invalid prefix", when decoding is not additive
            text = self._restart()
        if text is None:
            return ""
        self._context = (self._context + self._pending)[-CONTEXT_TOKENS:]
        self._pending.clear()
        return self._release(text)

    def _restart(self) -> str | None:
        """Decode what is pending on its own, and go on from there."""
        self._context = []
        self._stream = self._new_stream()
        text: str = self._tokenizer.decode(self._pending, skip_special_tokens=self._skip)
        return None if text.endswith(REPLACEMENT) else text

    def _release(self, text: str) -> str:
        self._held += text
        if not self._stop:
            text, self._held = self._held, ""
            return text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max(_overlap(self._held, stop) for stop in self._stop)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def finish(self) -> str:
        """The rest of the text at its end: what was held back, and what bytes of an unfinished character leave."""
        if self.stopped:
            return ""
        rest = ""
        if self._pending:
            before = self._tokenizer.decode(self._context, skip_special_tokens=self._skip)
            after = self._tokenizer.decode(self._context + self._pending, skip_special_tokens=self._skip)
            rest = after[len(before) :] if after.startswith(before) else ""
            self._pending.clear()
        text = self._release(rest)
        text, self._held = text + self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
