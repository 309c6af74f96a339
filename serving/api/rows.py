"""The engine's rows behind one HTTP request: submitted together, merged into one stream, ended together.

Knows nothing of the shape of replies.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable
from types import TracebackType
from typing import TypeVar
from uuid import uuid4

from fastapi import Request
from starlette.requests import ClientDisconnect

from serving.api.prepare import Prepared
from serving.errors import Draining, InternalError
from serving.types import EngineClient, GenerationEvent, GenerationRequest, GenerationStream, TenantLimits

UNLIMITED = sys.maxsize
T = TypeVar("T")


class Rows:
    """Leaving the block ends whatever still runs. Row i is choice i."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._streams: list[GenerationStream] = []
        self._unfinished: dict[str, int] = {}

    def __enter__(self) -> Rows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def __len__(self) -> int:
        return len(self._streams)

    def submit(self, tenant: str, prepared: Prepared, limits: TenantLimits) -> None:
        """Queue the rows, with the tenant's weight and as far as its queue goes. Raises what `EngineClient.submit`
        raises; the rows before it then end with the block."""
        revision = None if prepared.pin is None else prepared.pin.content_hash
        ids = [uuid4().hex for _ in prepared.rows]
        for request_id, row in zip(ids, prepared.rows, strict=True):
            request = GenerationRequest(
                request_id,
                tenant,
                row.prompt,
                row.sampling,
                revision,
                prepared.cache_salt,
                prepared.priority,
                follows=None if row.leader is None else ids[row.leader],
                pooled=row.pooled,
                weight=limits.weight,
                max_queued=UNLIMITED if limits.queued_requests is None else limits.queued_requests,
            )
            self._streams.append(self._engine.submit(request))
            self._unfinished[request_id] = len(self._streams) - 1

    def end(self) -> None:
        """Abort the unfinished rows: their last event says so."""
        for request_id in self._unfinished:
            self._engine.abort(request_id)

    async def events(self) -> AsyncIterator[tuple[int, GenerationEvent]]:
        """Events of all rows with their row, as they come. Raises `InternalError` if a row fails, `Draining` if the
        server ends it."""
        async for index, event in merge(self._streams):
            if event.finish_reason is not None:
                self._unfinished.pop(event.request_id, None)
            if event.finish_reason == "error":
                raise InternalError(event.error or "the engine failed while answering this request")
            if event.finish_reason == "abort":
                raise Draining("the server is shutting down and ended this request before it was finished")
            yield index, event


async def merge(streams: list[GenerationStream]) -> AsyncIterator[tuple[int, GenerationEvent]]:
    """The events of `streams`, each with the index of its stream, in the order in which they arrive."""
    if len(streams) == 1:  # as for most requests: one task less to wake for each token
        async for event in streams[0]:
            yield 0, event
        return
    queue: asyncio.Queue[tuple[int, GenerationEvent] | BaseException | None] = asyncio.Queue()

    async def pump(index: int, stream: GenerationStream) -> None:
        try:
            async for event in stream:
                queue.put_nowait((index, event))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`; when the client goes first, `work` is cancelled and `ClientDisconnect` raised."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect()
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
