from __future__ import annotations

import asyncio
from threading import Event

import pytest

from serving.api.threads import TenantThreads


def test_one_tenant_waits_for_itself_and_nobody_else() -> None:
    go, started = Event(), []

    def slow(number: int) -> int:
        started.append(number)
        assert go.wait(20)
        return number

    async def main() -> None:
        threads = TenantThreads(each=2)
        flood = [asyncio.create_task(threads.run("a", slow, number)) for number in range(100)]
        while len(started) < 2:
            await asyncio.sleep(0.001)
        assert await threads.run("b", lambda: "answered") == "answered"
        assert sorted(started) == [0, 1], "more than two at once, or not the first two"
        assert len(threads) == 1
        go.set()
        assert await asyncio.gather(*flood) == list(range(100))
        assert len(threads) == 0

    asyncio.run(main())


def test_an_error_or_an_end_while_waiting_leaves_nothing_behind() -> None:
    async def main() -> None:
        threads, go = TenantThreads(each=1), Event()
        with pytest.raises(ZeroDivisionError):
            await threads.run("a", divmod, 1, 0)
        first = asyncio.create_task(threads.run("a", go.wait, 20))
        second = asyncio.create_task(threads.run("a", go.wait, 20))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert len(threads) == 1
        go.set()
        assert await first
        assert len(threads) == 0

    asyncio.run(main())
