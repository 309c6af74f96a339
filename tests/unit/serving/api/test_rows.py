from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from serving.api.rows import merge
from serving.types import GenerationEvent


class Scripted:
    """A stream that waits before each event: "a" then "b" after 2 ticks each, and so on."""

    def __init__(self, name: str, ticks: list[int], error: Exception | None = None) -> None:
        self.name, self.ticks, self.error = name, ticks, error
        self.ended = False

    async def __aiter__(self) -> AsyncIterator[GenerationEvent]:
        try:
            for number, ticks in enumerate(self.ticks):
                for _ in range(ticks):
                    await asyncio.sleep(0)
                yield GenerationEvent(self.name, text=f"{self.name}{number}")
            if self.error is not None:
                raise self.error
        finally:
            self.ended = True


def collect(*streams: Scripted, stop_after: int | None = None) -> list[tuple[int, str]]:
    async def run() -> list[tuple[int, str]]:
        found: list[tuple[int, str]] = []
        events = merge(list(streams))
        async for index, event in events:
            found.append((index, event.text))
            if len(found) == stop_after:
                await events.aclose()  # type: ignore[attr-defined]
                await asyncio.sleep(0)
                break
        return found

    return asyncio.run(run())


def test_events_come_as_they_arrive_each_with_its_stream() -> None:
    found = collect(Scripted("a", [0, 9, 9]), Scripted("b", [4, 1, 1]))
    assert [text for index, text in found if index == 0] == ["a0", "a1", "a2"]
    assert [text for index, text in found if index == 1] == ["b0", "b1", "b2"]
    assert found.index((1, "b2")) < found.index((0, "a1"))


def test_a_failing_stream_fails_the_whole() -> None:
    other = Scripted("b", [50])
    with pytest.raises(RuntimeError, match="broken"):
        collect(Scripted("a", [0], RuntimeError("broken")), other)
    assert other.ended


def test_leaving_early_ends_the_streams() -> None:
    streams = Scripted("a", [0, 50]), Scripted("b", [50, 50])
    assert collect(*streams, stop_after=1) == [(0, "a0")]
    assert all(stream.ended for stream in streams)
