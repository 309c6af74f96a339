"""Structures that answers must match, compiled, and which tokens they allow next. Knows no sampling and no requests.

A `Matcher` follows one answer. Its errors are the grammar's own limits, met while the answer grows: no token is
allowed from there on.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence

import torch
from cachetools import LRUCache
from llguidance import LLMatcher, LLParserLimits
from torch import Tensor

from serving.engine.grammar_process import LIMITS, MEMORY, GrammarProcess
from serving.engine.structures import grammar_of
from serving.engine.vocabulary import Vocabulary
from serving.errors import InvalidValue
from serving.types import Structure
from vblora import kernels

KEPT_BYTES = 256 << 20
LEAST_BYTES = 1 << 20  # what a compiled grammar counts for at least, so that at most 256 are kept
MAX_MESSAGE = 300
WORD = 32  # bits of one
NAMES = {
    "json_object": "JSON",
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
    "choice": "the choice",
    "grammar": "the grammar",
    "tools": "the tools",
}
NOTHING_MATCHES = "nothing can match it"
_PLACE = re.compile(r"^(?:at )?(\d+)\((\d+)\): ")
_BIT_VALUES = 1 << torch.arange(8, dtype=torch.uint8)


class Matcher:
    """What one answer may still become."""

    def __init__(self, compiled: LLMatcher, words: int) -> None:
        self.compiled = compiled
        self.words = words  # of a mask

    def advance(self, token: int) -> bool:
        """Take the answer's next token; False once nothing but the end of text may follow. After an error True: the
        next mask then allows nothing, and `error` says why."""
        self.compiled.consume_token(token)
        return self.compiled.is_error() or not self.compiled.is_stopped()

    @property
    def error(self) -> str | None:
        """Why no token is allowed any more, in words fit for a stranger; None while all is well."""
        return explain(self.compiled.get_error()) if self.compiled.is_error() else None


class Grammars:
    """Compiled structures, those used last kept. `seconds` and `memory`, in bytes, bound what compiling one may take.

    Thread-safe. `check` is slow, run it off the event loop; `matcher` is quick for what was checked.
    """

    def __init__(self, vocabulary: Vocabulary, *, seconds: float = 5.0, memory: int = MEMORY) -> None:
        self._vocabulary = vocabulary
        self._process = GrammarProcess(vocabulary, seconds=seconds, memory=memory)
        self._kept: LRUCache[Structure, tuple[LLMatcher, int]] = LRUCache(KEPT_BYTES, getsizeof=lambda entry: entry[1])
        self._lock = threading.Lock()

    def known(self, structure: Structure) -> bool:
        """Whether this structure is compiled already."""
        with self._lock:
            return structure in self._kept

    def check(self, structure: Structure, param: str) -> None:
        """Compile a structure, in another process before this one.

        Raises `InvalidValue` with `param` for what cannot be compiled within the limits or matches no text, and what
        `GrammarProcess.compile` raises.
        """
        if self.known(structure):
            return
        try:
            compiled, size = self._compile_carefully(structure)
        except ValueError as error:
            raise InvalidValue(f"{NAMES[structure.kind]} cannot be used: {explain(str(error))}", param=param) from error
        with self._lock:
            self._kept[structure] = compiled, max(size, LEAST_BYTES)

    def _compile_carefully(self, structure: Structure) -> tuple[LLMatcher, int]:
        """A structure's matcher, and the bytes it takes. Raises ValueError for one that is no good."""
        grammar = grammar_of(structure, self._vocabulary.single)
        trial = self._process.compile(grammar)
        if trial.error:
            raise ValueError(trial.error)
        compiled = self._compile(grammar)
        if compiled.is_error():
            raise ValueError(compiled.get_error())
        return compiled, trial.bytes

    def matcher(self, structure: Structure) -> Matcher:
        """A matcher at the beginning of an answer. Never raises: one of what cannot be compiled is in error."""
        with self._lock:
            kept = self._kept.get(structure)
        compiled = kept[0].deep_copy() if kept is not None else self._compile_again(structure)
        return Matcher(compiled, -(-self._vocabulary.num_tokens // WORD))

    def _compile_again(self, structure: Structure) -> LLMatcher:
        try:
            return self._compile(grammar_of(structure, self._vocabulary.single))
        except ValueError:
            return self._compile("")

    def close(self) -> None:
        """End the process that compiles; it starts again if it is needed again."""
        self._process.close()

    def _compile(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._vocabulary.matching, grammar, log_level=0, limits=LLParserLimits(**LIMITS))


def masks(matchers: Sequence[Matcher]) -> Iterator[Tensor]:
    """For each matcher the tokens it allows next: (tokens / 32,) int32, a bit a token, all 0 after an error."""
    words = max((matcher.words for matcher in matchers), default=0)
    bits = torch.zeros(len(matchers), words, dtype=torch.int32)
    for matcher, mask in zip(matchers, bits, strict=True):
        matcher.compiled.unsafe_compute_mask_ptr(mask.data_ptr(), 4 * words)
        if matcher.compiled.is_error():
            mask.zero_()
    return iter(bits)


def apply_mask(row: Tensor, mask: Tensor) -> None:
    """Set the logits (vocabulary,) of tokens that `mask` does not allow to minus infinity, in place."""
    if kernels.usable(row):
        kernels.forbid(row, mask)
        return
    bits = (mask.view(torch.uint8)[:, None] & _BIT_VALUES).ne(0).flatten().to(row.device)
    known = min(len(row), len(bits))
    row[:known].masked_fill_(~bits[:known], float("-inf"))
    row[known:] = float("-inf")


def explain(error: str) -> str:
    """One line of what llguidance says of a grammar, for a stranger: no traces, no paths, no end."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["it is empty"]
    said = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    said = _PLACE.sub(r"line \1, column \2: ", said)
    if "NoExtension" in said:
        return NOTHING_MATCHES
    if "panic" in said.lower() or ".rs:" in said:
        return "it cannot be compiled"
    return said if len(said) <= MAX_MESSAGE else said[: MAX_MESSAGE - 1] + "…"
