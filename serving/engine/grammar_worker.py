"""A program that compiles grammars for a server that trusts none of them. Knows nothing of the server.

Run by path. Lines of JSON on standard input: first the tokens, then one grammar after another. For each a line of
JSON on standard output: `error`, empty if it compiled, and the `bytes` of memory that took. Every grammar is compiled
in a child process with a limit on memory, which is killed when its time is over. The program ends with its input.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

OUT_OF_TIME = "it takes too long to compile"
OUT_OF_MEMORY = "it takes too much memory to compile"
LONGEST_LINE, MOST_LINES = 1000, 10
_STATM = Path("/proc/self/statm")


class Pieces:
    """Tokens as llguidance asks for them; it never needs those of a text here."""

    eos_token_id = 0
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int]) -> None:
        self.tokens = tokens
        self.special_token_ids = special

    def __call__(self, text: bytes) -> list[int]:
        return []


def main() -> None:
    tokenizer = vocabulary(**json.loads(sys.stdin.readline()))
    say({"ready": True})
    for line in sys.stdin:
        say(in_child(tokenizer, json.loads(line)))


def vocabulary(tokens: list[str], special: list[int], end_of_text: list[int]) -> LLTokenizer:
    """The tokens, each the bytes that its characters in Latin-1 stand for."""
    pieces = Pieces([token.encode("latin-1") for token in tokens], special)
    return LLTokenizer(TokenizerWrapper(pieces), n_vocab=len(tokens), eos_token=end_of_text)


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def in_child(tokenizer: LLTokenizer, order: dict[str, Any]) -> dict[str, Any]:
    """Compile an order's `grammar` under its `limits` in a child with so many `seconds` and `bytes`."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        work(tokenizer, order, writing)
    os.close(writing)
    in_time = bool(select.select([reading], [], [], order["seconds"])[0])
    if not in_time:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not in_time:
        return {"error": OUT_OF_TIME, "bytes": 0}
    return json.loads(text) if text else {"error": OUT_OF_MEMORY, "bytes": 0}  # it died without a word


def work(tokenizer: LLTokenizer, order: dict[str, Any], writing: int) -> None:
    """What the child does; it never returns."""
    os.dup2(os.open(os.devnull, os.O_RDWR), 2)  # what a dying allocator has to say
    limit(order["bytes"], order["seconds"])
    try_out(tokenizer, LLMatcher(tokenizer, 'start: "a"', log_level=0))  # what any grammar takes does not count
    before = pages(1)
    matcher = LLMatcher(tokenizer, order["grammar"], log_level=0, limits=LLParserLimits(**order["limits"]))
    error = try_out(tokenizer, matcher)
    answer = {"error": error, "bytes": (pages(1) - before) * resource.getpagesize()}
    os.write(writing, json.dumps(answer).encode())
    os._exit(0)


def try_out(tokenizer: LLTokenizer, matcher: LLMatcher) -> str:
    """Compute the first mask, and one more behind what the grammar begins with in any case; what went wrong."""
    matcher.compute_bitmask()
    if not matcher.is_error():
        matcher.try_consume_tokens(tokenizer.greedy_tokenize(matcher.compute_ff_bytes().decode(errors="ignore")))
        matcher.compute_bitmask()
    lines = [line[:LONGEST_LINE] for line in matcher.get_error().splitlines()]  # they quote what they are about
    return "\n".join(lines[:MOST_LINES] + lines[MOST_LINES:][-MOST_LINES:])


def limit(memory: int, seconds: float) -> None:
    """Bound this process's memory to `memory` bytes more than now, and its computing time, should nobody watch it."""
    if _STATM.exists():
        most = pages(0) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 2,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def pages(column: int) -> int:
    """Pages of memory that this process has reserved (column 0) or uses (1); 0 where the system does not tell."""
    return int(_STATM.read_text().split()[column]) if _STATM.exists() else 0


if __name__ == "__main__":
    main()
