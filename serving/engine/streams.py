"""Where a request's events go: a stream on an event loop, a function, or a list of whole answers. Knows no engine."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from serving.types import FinishReason, GenerationEvent, TokenLogprob

Sink = Callable[[GenerationEvent], None]


@dataclass(frozen=True, slots=True)
class Generation:
    """The whole answer to one request."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    embedding: tuple[float, ...] = ()


class AsyncStream:
    """The events of one request, on the event loop that submitted it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[GenerationEvent] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[GenerationEvent]:
        while True:
            event = await self.events.get()
            yield event
            if event.finish_reason is not None:
                return


def hand_over(batch: list[tuple[AsyncStream, GenerationEvent]]) -> None:
    """Put events into their streams; runs on the streams' event loop."""
    for stream, event in batch:
        stream.events.put_nowait(event)


def collect(events: queue.SimpleQueue[GenerationEvent]) -> Generation:
    """Wait for all events of a request."""
    taken: list[GenerationEvent] = []
    while not taken or taken[-1].finish_reason is None:
        taken.append(events.get())
    first, last = taken[0], taken[-1]
    return Generation(
        "".join(event.text for event in taken),
        tuple(token for event in taken for token in event.token_ids),
        last.finish_reason or "error",
        last.error,
        tuple(score for event in taken for score in event.logprobs),
        first.prompt_logprobs,
        last.embedding,
    )
