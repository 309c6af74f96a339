"""Whose turn it is at something that is done once at a time. Knows not what."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import CapacityLimiter, Lock


class Turns:
    """One thread works at a time, and of each tenant one request waits for it: whoever comes waits for at most one
    of every other tenant's."""

    def __init__(self) -> None:
        self._work = CapacityLimiter(1)
        self._tenants: dict[str, Lock] = {}

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[CapacityLimiter]:
        """Wait for the tenant's other requests; gives the limiter of the thread to run."""
        lock = self._tenants.setdefault(tenant, Lock())
        try:
            async with lock:
                yield self._work
        finally:
            if not lock.locked():
                self._tenants.pop(tenant, None)
