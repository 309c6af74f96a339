"""What a request makes the registry, the storage and the memory of adapters do, written down with names left out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from sqlalchemy import Engine, event

from serving.adapters.residency import Residency
from serving.adapters.storage.revisions import RevisionStorage

WATCHED: tuple[type, ...] = (RevisionStorage, Residency)
# Who calls is asked at most once a second, and used tokens are written now and then, whatever is asked for.
UNRELATED = ("FROM keys", "UPDATE keys", "FROM tenants", "usage")


class Recorder:
    """Statements and calls in their order, from whatever thread. The beginning of a transaction is one of them where
    a statement follows that is not `UNRELATED`."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._begun: dict[int, str] = {}

    def statement(self, connection: Any, _: Any, statement: str, parameters: Any, *__: Any) -> None:
        if statement.startswith("BEGIN"):
            self._begun[id(connection)] = statement
        elif not any(word in statement for word in UNRELATED):
            self.lines += filter(None, [self._begun.pop(id(connection), None)])
            self.lines.append(f"{' '.join(statement.split())} {parameters!r}")

    def call(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def recorded(subject: Any, *arguments: Any, **keywords: Any) -> Any:
            self.lines.append(f"{name}{tuple(map(_short, arguments))!r}")
            return function(subject, *arguments, **keywords)

        return recorded


@contextmanager
def recording() -> Iterator[Recorder]:
    """Of every database and of the classes `WATCHED`, of the whole process."""
    recorder = Recorder()
    with ExitStack() as stack:
        for subject in WATCHED:
            for name, function in vars(subject).items():
                if callable(function) and not name.startswith("_"):
                    stack.enter_context(
                        patch.object(subject, name, recorder.call(f"{subject.__name__}.{name}", function))
                    )
        event.listen(Engine, "before_cursor_execute", recorder.statement)
        stack.callback(event.remove, Engine, "before_cursor_execute", recorder.statement)
        yield recorder


def _short(argument: Any) -> Any:
    """Names and hashes as they are; of bytes and of adapters only that they were there."""
    return argument if isinstance(argument, str) else type(argument).__name__
