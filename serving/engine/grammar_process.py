"""The process that compiles strangers' grammars first, so that none can take this one's time or memory. Knows no
requests; what it runs is `grammar_worker.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from serving.engine.vocabulary import Vocabulary
from serving.errors import EngineUnavailable, Overloaded

PROGRAM = Path(__file__).with_name("grammar_worker.py")
LIMITS: dict[str, Any] = {
    "step_lexer_fuel": 100_000,  # bound the time of one mask, which all requests of a step wait for
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,  # and the memory that one answer takes while it grows
    "verbose_errors": False,
}
MEMORY = 128 << 20
START_SECONDS = 60.0  # a vocabulary of 262,144 takes 2
GRACE_SECONDS = 3.0  # for the worker to end its own child
QUEUE_SECONDS = 30.0
KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH")
RETRY_AFTER_SECONDS = 1


class Trial(NamedTuple):
    """How compiling went: what went wrong, or an empty text; and the bytes of memory it took."""

    error: str
    bytes: int


NO_ANSWER = Trial("it cannot be compiled", 0)


class GrammarProcess:
    """A worker with this vocabulary, started when it is first needed and again when it has died. Thread-safe; it
    compiles one grammar at a time, each in at most `seconds` and `memory` bytes."""

    def __init__(self, vocabulary: Vocabulary, *, seconds: float = 5.0, memory: int = MEMORY) -> None:
        self._vocabulary = vocabulary
        self._seconds = seconds
        self._memory = memory
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def compile(self, grammar: str) -> Trial:
        """Compile a grammar, and compute its first token mask.

        Raises `Overloaded` when too many wait, `EngineUnavailable` when the worker does not start.
        """
        order = {"grammar": grammar, "limits": LIMITS, "seconds": self._seconds, "bytes": self._memory}
        if not self._lock.acquire(timeout=QUEUE_SECONDS):
            raise Overloaded("too many grammars wait to be compiled", retry_after=RETRY_AFTER_SECONDS)
        try:
            return self._try(order) or self._try(order) or NO_ANSWER
        finally:
            self._lock.release()

    def _try(self, order: dict[str, Any]) -> Trial | None:
        """How compiling went; None when the worker has died meanwhile, which need not be the grammar's fault."""
        try:
            return Trial(**self._ask(self._running(), order, self._seconds + GRACE_SECONDS))
        except TimeoutError:
            return NO_ANSWER
        except OSError:
            return None

    def close(self) -> None:
        """End the worker."""
        with self._lock:
            self._kill()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._kill()
        if self._process is None:
            self._start()
        assert self._process is not None
        return self._process

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
            start_new_session=True,  # Ctrl-C is for the server
        )
        setup = {
            "tokens": [piece.decode("latin-1") for piece in self._vocabulary.pieces()],
            "special": self._vocabulary.special,
            "end_of_text": self._vocabulary.end_of_text,
        }
        try:
            self._ask(self._process, setup, START_SECONDS)
        except OSError as error:
            message = "the compiler of grammars does not start"
            raise EngineUnavailable(message, retry_after=RETRY_AFTER_SECONDS) from error

    def _ask(self, process: subprocess.Popen[bytes], message: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a line and wait for one. Raises OSError, with the process at its end, where none comes: a
        TimeoutError for one that is silent."""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(_line(process.stdout.fileno(), time.monotonic() + seconds))
        except OSError:
            self._kill()
            raise
        return answer

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError), process:  # what it never read cannot be written any more
                pass
            process.wait()


def _line(descriptor: int, deadline: float) -> bytes:
    """The next line from a pipe. Raises TimeoutError when the deadline passes first, BrokenPipeError when it ends."""
    line = b""
    poll = select.poll()  # unlike select, it takes descriptors above 1,023
    poll.register(descriptor, select.POLLIN)
    while not line.endswith(b"\n"):
        if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
            raise TimeoutError
        if not (part := os.read(descriptor, 1 << 16)):
            raise BrokenPipeError
        line += part
    return line
