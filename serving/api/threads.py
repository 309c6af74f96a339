"""Threads for work that waits for a disk, a database or a network: a few for each tenant. Knows not what is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

from anyio import CapacityLimiter, to_thread

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")
EACH = 4


class TenantThreads:
    """At most `each` threads of the process's pool work for one tenant at a time: whatever a tenant waits for, the
    others find threads. Its other calls wait, first come first served, without one."""

    def __init__(self, each: int = EACH) -> None:
        self._each = each
        self._limiters: dict[str, CapacityLimiter] = {}
        self._users: Counter[str] = Counter()

    def __len__(self) -> int:
        """Tenants that it remembers: those that something is done for now."""
        return len(self._limiters)

    async def run(self, tenant: str, call: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        """What `call` returns or raises, on a thread."""
        limiter = self._limiters.setdefault(tenant, CapacityLimiter(self._each))
        self._users[tenant] += 1
        try:
            async with limiter:
                return await to_thread.run_sync(call, *arguments)
        finally:
            self._users[tenant] -= 1
            if not self._users[tenant]:
                del self._users[tenant], self._limiters[tenant]
