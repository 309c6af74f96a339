"""What every route needs, handed over by `serving/app.py`, and what is noted about one request on its way.

Knows no routes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Protocol

from fastapi import Depends, Query, Request
from prometheus_client import CollectorRegistry

from serving.api.lifecycle import Lifecycle
from serving.api.replies import Usage
from serving.api.threads import TenantThreads
from serving.api.turns import Turns
from serving.errors import ServingError
from serving.tenancy.metering import Quotas, UsageLedger
from serving.tenancy.records import Authenticator, TenantAdmin
from serving.types import (
    MAX_PAGE,
    AdapterCatalog,
    Caller,
    EngineClient,
    GenerationEvent,
    ModelCard,
    StructureChecker,
    TextCodec,
)


@dataclass(frozen=True, slots=True)
class Caps:
    """The most one request may ask for: sizes are bytes or characters, the rest are entries."""

    body_bytes: int = 4 * 2**20
    upload_bytes: int = 64 * 2**20
    prompts: int = 256
    choices: int = 16
    stop: int = 16
    stop_token_ids: int = 1024
    allowed_token_ids: int = 8192
    bad_words: int = 128
    logit_bias: int = 1024
    logprobs: int = 20
    tools: int = 128
    structure_bytes: int = 64 * 2**10
    structure_choices: int = 1024


class ApiObserver(Protocol):
    """What the routes report while they work; `serving/metrics.py` implements it."""

    def on_error(self, code: str, reason: str | None = None) -> None:
        """A request was answered with the error `code`; `reason` is the limit that refused it, if one did."""

    def on_adapter_loaded(self, source: str, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True)
class ApiContext:
    """The parts behind the routes. `hosts` None answers any Host header; a `keyed` server asks for keys."""

    engine: EngineClient
    codec: TextCodec
    structures: StructureChecker
    card: ModelCard
    catalog: AdapterCatalog
    authenticator: Authenticator
    tenants: TenantAdmin
    observer: ApiObserver
    lifecycle: Lifecycle
    quotas: Quotas
    usage: UsageLedger
    registry: CollectorRegistry
    version: str
    caps: Caps = Caps()
    compiling: Turns = field(default_factory=Turns)  # of what answers must match
    threads: TenantThreads = field(default_factory=TenantThreads)  # for what a caller's request waits for
    hosts: frozenset[str] | None = None
    keyed: bool = False


@dataclass(slots=True)
class RequestRecord:
    """What the log line, the metrics and the usage say of one request; never its text. `admitted` once its rows are
    the engine's; `headers` are for its reply, whatever that will be."""

    request_id: str
    caller: Caller | None = None
    adapter: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    error_code: str | None = None
    refusal: str | None = None
    admitted: bool = False
    headers: dict[str, str] = field(default_factory=dict)

    def fail(self, error: ServingError) -> None:
        """The request is answered with `error`."""
        self.error_code = error.code
        self.refusal = error.reason

    @property
    def usage(self) -> Usage:
        return Usage.of(self.prompt_tokens, self.cached_tokens, self.generated_tokens)

    def count(self, event: GenerationEvent) -> None:
        """Add what an event of one of the request's rows says."""
        self.generated_tokens += len(event.token_ids)
        self.cached_tokens += event.cached_tokens


def _context(request: Request) -> ApiContext:
    context: ApiContext = request.app.state.context
    return context


def _record(request: Request) -> RequestRecord:
    record: RequestRecord = request.state.record
    return record


def _caller(record: Annotated[RequestRecord, Depends(_record)]) -> Caller:
    if record.caller is None:
        raise RuntimeError("a route that needs a caller was reached without authentication")
    return record.caller


async def _until_answered() -> AsyncIterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


Context = Annotated[ApiContext, Depends(_context)]
Record = Annotated[RequestRecord, Depends(_record)]
CallerOf = Annotated[Caller, Depends(_caller)]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
After = Annotated[str | None, Query()]
UntilAnswered = Annotated[ExitStack, Depends(_until_answered)]
"""A stack that is unwound when the last byte of the answer is out, or the client is gone, or anything failed."""
