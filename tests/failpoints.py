"""Crashes for tests of durability: a failure at the nth write, and the disk as a kill at each write would leave it.

Writes are those of the operating system's calls that change names or make files durable, those of databases (each
statement that changes rows, and each commit), and those of buckets: each object that is put or removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest
from sqlalchemy.engine.default import DefaultDialect

from serving.errors import StorageUnavailable

FALLIBLE = ("replace", "fsync", "mkdir")
WRITES = (*FALLIBLE, "unlink", "rmdir")
_CHANGING = ("INSERT", "UPDATE", "DELETE")


def fails_at(countdown: int, change: Callable[[], object]) -> bool:
    """Run `change` while call number `countdown` (from 0) of `FALLIBLE`, of a database or of a bucket, and every later
    one, raises `OSError`.

    False if the change made fewer calls. A commit, and a write to a bucket, count twice: they can fail before they took
    place and afterwards. An `OSError` that leaves the change, or what it has become, is swallowed.
    """
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1
        if calls > countdown:
            raise OSError("failpoint")

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in FALLIBLE:
            monkeypatch.setattr(os, name, _around(getattr(os, name), step))
        _watch_databases(monkeypatch, step, step)
        for name in ("put", "delete"):
            monkeypatch.setattr(obstore, name, _around(getattr(obstore, name), step, step))
        with contextlib.suppress(OSError, StorageUnavailable):
            change()
    return calls > countdown


def snapshots(folder: Path, into: Path, change: Callable[[], object]) -> list[Path]:
    """Copies of `folder` as it was before and after every call of `WRITES` that `change` made."""
    taken: list[Path] = []
    copying = False

    def take() -> None:
        nonlocal copying
        if not copying:
            copying = True
            taken.append(Path(shutil.copytree(folder, into / str(len(taken)))))
            copying = False

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in WRITES:
            monkeypatch.setattr(os, name, _around(getattr(os, name), take, take))
        _watch_databases(monkeypatch, take, take)
        change()
    return taken


def _around(
    write: Callable[..., Any], before: Callable[[], None], after: Callable[[], None] = lambda: None
) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        before()
        result = write(*arguments, **keywords)
        after()
        return result

    return call


def _watch_databases(monkeypatch: pytest.MonkeyPatch, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Call `before` ahead of every statement that changes rows, and `before` and `after` around every commit."""
    execute: Callable[..., None] = DefaultDialect.do_execute

    def do_execute(dialect: DefaultDialect, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith(_CHANGING):
            before()
        execute(dialect, cursor, statement, *rest)

    monkeypatch.setattr(DefaultDialect, "do_execute", do_execute)
    monkeypatch.setattr(DefaultDialect, "do_commit", _around(DefaultDialect.do_commit, before, after))
