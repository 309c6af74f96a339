"""The requests of an engine that have not ended: whose they are, where their events go, and how many there may be.

Knows no tokens and no steps.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from logging import getLogger
from threading import Lock

from serving.engine.streams import AsyncStream, Sink, hand_over
from serving.errors import Overloaded, RateLimitExceeded
from serving.types import EngineSettings, GenerationEvent, GenerationRequest

log = getLogger(__name__)

RETRY_AFTER_SECONDS = 1


@dataclass(frozen=True, slots=True)
class _Open:
    request: GenerationRequest
    stream: AsyncStream | Sink


class OpenRequests:
    """Requests by id, from their submission to their last event. Thread-safe.

    `running` tells the tenants of the rows that run now, one entry a row.
    """

    def __init__(self, settings: EngineSettings, running: Callable[[], Sequence[str]]) -> None:
        self._settings = settings
        self._running = running
        self._lock = Lock()
        self._open: dict[str, _Open] = {}
        self._load: Counter[str] = Counter()

    def __len__(self) -> int:
        with self._lock:
            return len(self._open)

    def requests(self) -> list[GenerationRequest]:
        """What is open now."""
        with self._lock:
            return [entry.request for entry in self._open.values()]

    def add(self, request: GenerationRequest, stream: AsyncStream | Sink, begin: Callable[[], None]) -> None:
        """Admit a request and `begin` it, or raise what `begin` raises and stay as before; nobody is admitted between.

        Raises `Overloaded`, `RateLimitExceeded` (the tenant's queue), and `ValueError` for an id that is open.
        """
        with self._lock:
            self._check(request)
            begin()
            self._open[request.request_id] = _Open(request, stream)
            self._load[request.tenant] += 1

    def deliver(self, events: Sequence[GenerationEvent]) -> None:
        """Hand a step's events to their streams, one call for each event loop, and forget requests that ended."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[AsyncStream, GenerationEvent]]] = defaultdict(list)
        with self._lock:
            targets = [(self._open[event.request_id].stream, event) for event in events]
            for event in events:
                if event.finish_reason is not None:
                    self._forget(event.request_id)
        for stream, event in targets:
            if isinstance(stream, AsyncStream):
                batches[stream.loop].append((stream, event))
            else:
                stream(event)
        for loop, batch in batches.items():
            try:
                loop.call_soon_threadsafe(hand_over, batch)
            except RuntimeError:  # the loop is closed: nobody waits for these events any more
                log.debug("%d events for a closed event loop", len(batch))

    def _check(self, request: GenerationRequest) -> None:
        """Bounds count what waits: a full batch is not a full queue."""
        if request.request_id in self._open:
            raise ValueError(f"request {request.request_id} is already running")
        if len(self._open) >= self._settings.max_queue + self._settings.max_batch_size:
            raise Overloaded("the server's queue is full", retry_after=RETRY_AFTER_SECONDS)
        limit = self._settings.max_queue_per_tenant if request.max_queued is None else request.max_queued
        if self._load[request.tenant] >= limit and self._waiting_of(request.tenant) >= limit:
            raise RateLimitExceeded(
                f"your queue of {limit} requests is full", reason="queued_requests", retry_after=RETRY_AFTER_SECONDS
            )

    def _waiting_of(self, tenant: str) -> int:
        """Requests of a tenant beyond those that run and those that could run now."""
        running = self._running()
        free = self._settings.max_batch_size - len(running)
        return self._load[tenant] - running.count(tenant) - free

    def _forget(self, request_id: str) -> None:
        tenant = self._open.pop(request_id).request.tenant
        self._load[tenant] -= 1
        if not self._load[tenant]:
            del self._load[tenant]
