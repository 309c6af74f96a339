"""Is the server taking work, and what work is still under way? Knows no HTTP and no engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Lifecycle:
    """Counts the requests in flight, refuses new ones once draining, and can end the rest. Event loop only."""

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0
        self._enders: dict[int, Callable[[], None]] = {}

    def drain(self) -> None:
        """Take no new work from now on."""
        self.draining = True

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts one request for as long as the block runs."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    @contextmanager
    def generation(self, end: Callable[[], None]) -> Iterator[None]:
        """While the block runs, `end_generations` calls `end`."""
        key = id(end)
        self._enders[key] = end
        try:
            yield
        finally:
            del self._enders[key]

    def end_generations(self) -> None:
        """End whatever still generates: its clients get an error and their answers close."""
        for end in list(self._enders.values()):
            end()
