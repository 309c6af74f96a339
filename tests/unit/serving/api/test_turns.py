"""Turns: one at a time, one of each tenant in the queue, nothing kept afterwards."""

from __future__ import annotations

import time

import anyio
from anyio import to_thread

from serving.api.turns import Turns


def test_nobody_waits_for_more_than_one_of_anothers() -> None:
    turns, done = Turns(), []

    def work(name: str) -> None:
        time.sleep(0.02)
        done.append(name)

    async def one(tenant: str, name: str) -> None:
        async with turns.turn(tenant) as limiter:
            await to_thread.run_sync(work, name, limiter=limiter)

    async def run() -> None:
        async with anyio.create_task_group() as group:
            for number in range(6):
                group.start_soon(one, "many", f"many{number}")
            await anyio.sleep(0.005)
            group.start_soon(one, "few", "few")

    anyio.run(run)
    assert len(done) == 7
    assert done.index("few") <= 1
    assert turns._tenants == {}


def test_whoever_gives_up_leaves_nothing_behind() -> None:
    turns = Turns()

    async def give_up() -> None:
        with anyio.move_on_after(0.01):
            async with turns.turn("a"):
                raise AssertionError("it is not its turn")

    async def run() -> None:
        async with turns.turn("a"), anyio.create_task_group() as group:
            group.start_soon(give_up)
        async with turns.turn("a"):
            pass

    anyio.run(run)
    assert turns._tenants == {}
