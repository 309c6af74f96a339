"""A memory of look-ups that forgets: nothing in it is older than a second. Knows not what is looked up."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

from cachetools import LRUCache

V = TypeVar("V")
SECONDS = 1.0
ENTRIES = 16_384


class Recent(Generic[V]):
    """Values by name, for `seconds` from the moment before they were looked up. Thread-safe and bounded."""

    def __init__(self, seconds: float = SECONDS, entries: int = ENTRIES, clock: Callable[[], float] = time.monotonic):
        self._seconds = seconds
        self._clock = clock
        self._lock = Lock()
        self._values: LRUCache[str, tuple[float, V]] = LRUCache(entries)
        self._cleared = clock()

    def now(self) -> float:
        """To be read before a look-up and handed to `put` with what it found."""
        return self._clock()

    def get(self, name: str) -> V:
        """Raises `KeyError` for what is not there or too old."""
        with self._lock:
            asked, value = self._values[name]
        if self._clock() - asked >= self._seconds:
            raise KeyError(name)
        return value

    def put(self, name: str, value: V, asked: float) -> None:
        """Remember what a look-up found that began at `asked`, unless everything was cleared since."""
        with self._lock:
            if asked >= self._cleared:
                self._values[name] = (asked, value)

    def clear(self) -> None:
        """Forget everything, and what is being looked up now."""
        with self._lock:
            self._values.clear()
            self._cleared = self._clock()
