"""How much was taken in the last minute, by name: sliding windows of the library `limits`, in memory or in Redis.

A sliding window counts what this minute took, and of what the minute before took the part that the last sixty seconds
still overlap. Knows no tenants.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import TypeVar

from limits.errors import ConfigurationError, StorageError
from limits.storage import MemoryStorage, RedisStorage

SECONDS = 60
RETRY_SECONDS = 2.0  # without Redis, before it is asked again
LOG_SECONDS = 60.0
TIMEOUT_SECONDS = 0.5
_UNLIMITED = 2**53  # Redis counts in doubles here
_log = logging.getLogger(__name__)
T = TypeVar("T")


class WindowsError(Exception):
    """The address of the Redis cannot be used; the message is for the operator."""


@dataclass(frozen=True, slots=True)
class Window:
    """What was taken before, and how long it still counts; what is being taken, and how long that will."""

    previous: int = 0
    previous_seconds: float = 0.0
    current: int = 0
    current_seconds: float = 0.0
    span: int = SECONDS

    @property
    def taken(self) -> int:
        return max(0, int(self.previous * self.previous_seconds / self.span) + self.current)

    @property
    def until_empty(self) -> float:
        """Seconds until nothing of it counts."""
        return self.current_seconds if self.current > 0 else self.previous_seconds if self.previous > 0 else 0.0

    def until(self, limit: int, cost: int) -> float:
        """Seconds until `cost`, at most `limit`, can be taken if nobody takes anything before."""
        room = limit - cost
        if self.taken <= room:
            return 0.0
        if self.current <= room:
            return self.previous_seconds - self.span * (room - self.current) / self.previous
        # What is current begins to fade when its own minute is over.
        return max(0.0, self.current_seconds - self.span) + self.span * (1 - room / self.current)


class _Store:
    """One storage of `limits`. The one in memory counts wrong when two threads meet in it."""

    def __init__(self, storage: MemoryStorage | RedisStorage, seconds: int) -> None:
        self._storage = storage
        self._seconds = seconds
        self._lock = Lock() if isinstance(storage, MemoryStorage) else nullcontext()

    def take(self, name: str, limit: int, cost: int) -> bool:
        with self._lock:
            return self._storage.acquire_sliding_window_entry(name, limit, self._seconds, cost)

    def read(self, name: str) -> Window:
        with self._lock:
            return Window(*self._storage.get_sliding_window(name, self._seconds), self._seconds)


@dataclass(frozen=True, slots=True)
class Charge:
    """What was taken, and where."""

    store: _Store
    name: str
    cost: int


class Windows:
    """The windows of all names. While Redis fails, those of this process's memory stand in: requests go on, and each
    process lets through as much as all may together. Thread-safe; with Redis, `take` and `read` wait for it."""

    def __init__(
        self, url: str | None = None, *, failed: Callable[[], None] = lambda: None, seconds: int = SECONDS
    ) -> None:
        """`failed` is called for each failure of the Redis at `url`. Raises `WindowsError` for a wrong address."""
        self._memory = _Store(MemoryStorage(), seconds)
        self._shared = None if url is None else _Store(_redis(url), seconds)
        self._failed = failed
        self._retry_at = 0.0
        self._log_at = 0.0
        self._giving_back = None if url is None else ThreadPoolExecutor(1, thread_name_prefix="quotas")

    def take(self, name: str, limit: int, cost: int) -> Charge | None:
        """Take `cost` if that leaves the last minute's within `limit`, else nothing."""
        store, taken = self._run(lambda store: store.take(name, limit, cost))
        return Charge(store, name, cost) if taken else None

    def read(self, name: str) -> Window:
        """The window as of now."""
        return self._run(lambda store: store.read(name))[1]

    def give_back(self, charge: Charge, amount: int) -> None:
        """Undo `amount` of a charge, in the minute that is now. Returns at once."""

        def act() -> None:
            try:
                charge.store.take(charge.name, _UNLIMITED, -amount)
            except StorageError as error:
                self._note(error)

        if charge.store is self._memory or self._giving_back is None:
            act()
        else:
            self._giving_back.submit(act)

    def close(self) -> None:
        """Give back what is still to be given back."""
        if self._giving_back is not None:
            self._giving_back.shutdown()

    def _run(self, action: Callable[[_Store], T]) -> tuple[_Store, T]:
        if self._shared is not None and time.monotonic() >= self._retry_at:
            try:
                return self._shared, action(self._shared)
            except StorageError as error:
                self._note(error)
        return self._memory, action(self._memory)

    def _note(self, error: Exception) -> None:
        self._failed()
        now = time.monotonic()
        self._retry_at = now + RETRY_SECONDS
        if now >= self._log_at:
            self._log_at = now + LOG_SECONDS
            _log.error("Redis cannot be used, quotas are counted by this process alone: %s", error)


def _redis(url: str) -> RedisStorage:
    """A storage that fails soon, so that no request waits for a Redis that is not there."""
    try:
        from redis import ConnectionPool  # an extra: not everybody has it
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        pool = ConnectionPool.from_url(
            url,
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        return RedisStorage(url, connection_pool=pool, key_prefix="vblora", wrap_exceptions=True)
    except ImportError as error:
        raise WindowsError("quotas in Redis need the extra `redis`: pip install 'vblora[redis]'") from error
    except (ConfigurationError, ValueError) as error:
        raise WindowsError(f"the address of the Redis cannot be used: {error}") from error
