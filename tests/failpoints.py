"""Crashes for tests of durability: a failure at the nth write, and the disk as a kill at each write would leave it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FALLIBLE = ("replace", "fsync", "mkdir")
WRITES = (*FALLIBLE, "unlink", "rmdir")


def fails_at(countdown: int, change: Callable[[], object]) -> bool:
    """Run `change` while call number `countdown` (from 0) of `FALLIBLE`, and every later one, raises `OSError`.

    False if the change made fewer calls. An `OSError` that leaves the change is swallowed.
    """
    calls = 0

    def failing(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > countdown:
                raise OSError("failpoint")
            return write(*arguments, **keywords)

        return call

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in FALLIBLE:
            monkeypatch.setattr(os, name, failing(getattr(os, name)))
        with contextlib.suppress(OSError):
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

    def recorded(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            take()
            result = write(*arguments, **keywords)
            take()
            return result

        return call

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in WRITES:
            monkeypatch.setattr(os, name, recorded(getattr(os, name)))
        change()
    return taken
