"""What happens to every request before its route: an id, a Host check, a caller, a size limit.

Plain ASGI, and it decides on the path alone, so that a request is refused before its body is read. Knows no bodies.
"""

from __future__ import annotations

import logging
import re
import time
from dataclasses import replace
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.context import ApiContext, RequestRecord
from serving.api.errors import CLIENT_CLOSED_REQUEST, error_response
from serving.errors import Draining, InternalError, InvalidValue, PermissionDenied, RequestTooLarge, ServingError
from serving.tenancy.access import required_role

REQUEST_ID_HEADER = "X-Request-Id"
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_UPLOAD_PATH = "/v1/adapters"
_ALWAYS_ANSWERED = frozenset({"/health", "/health/live", "/health/ready", "/version", "/metrics", "/openapi.json"})
_logger = logging.getLogger("serving.access")


class RequestScope:
    """The outermost layer: gives a request its id and record, turns what nobody caught into 500, writes a log line."""

    def __init__(self, app: ASGIApp, context: ApiContext) -> None:
        self._app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        record = RequestRecord(given if _REQUEST_ID.fullmatch(given) else uuid4().hex)
        scope["state"] = {**scope.get("state", {}), "record": record}
        reply = _Reply(send, record)
        started = time.perf_counter()
        try:
            with self._context.lifecycle.request():
                await self._run(scope, receive, reply, record)
        finally:
            self._report(scope, record, reply.status, time.perf_counter() - started)

    async def _run(self, scope: Scope, receive: Receive, reply: _Reply, record: RequestRecord) -> None:
        try:
            await self._app(scope, receive, reply.send)
        except ServingError as error:
            await self._fail(error, scope, receive, reply, record)
        except Exception:
            _logger.exception("request_failed", extra={"request_id": record.request_id})
            await self._fail(InternalError("internal error"), scope, receive, reply, record)

    async def _fail(
        self, error: ServingError, scope: Scope, receive: Receive, reply: _Reply, record: RequestRecord
    ) -> None:
        record.fail(error)
        if reply.status is None:
            await error_response(error)(scope, receive, reply.send)

    def _report(self, scope: Scope, record: RequestRecord, status: int | None, seconds: float) -> None:
        if record.error_code is not None:
            self._context.observer.on_error(record.error_code, record.refusal)
        _logger.info(
            "request",
            extra={
                "request_id": record.request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status or CLIENT_CLOSED_REQUEST,
                "seconds": round(seconds, 6),
                "tenant": record.caller.tenant if record.caller else None,
                "adapter": record.adapter,
                "prompt_tokens": record.prompt_tokens,
                "cached_tokens": record.cached_tokens,
                "generated_tokens": record.generated_tokens,
                "error": record.error_code,
            },
        )


class _Reply:
    """`send` with the request's id and what its record has among the headers; remembers the status."""

    def __init__(self, send: Send, record: RequestRecord) -> None:
        self._send = send
        self._record = record
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message).update({REQUEST_ID_HEADER: self._record.request_id, **self._record.headers})
        await self._send(message)


class HostCheck:
    """Answers only the Hosts of the context, so that no page elsewhere can reach a server on loopback by a name that
    resolves to it."""

    def __init__(self, app: ASGIApp, context: ApiContext) -> None:
        self._app = app
        self._hosts = context.hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._hosts is not None:
            host = re.sub(r":\d*$", "", Headers(scope=scope).get("host", "")).lower()
            if host not in self._hosts:
                allowed = ", ".join(sorted(self._hosts))
                raise InvalidValue(f"this server answers only the Hosts {allowed}", param="Host")
        await self._app(scope, receive, send)


class Access:
    """Who calls, and may they: 401 and 403 before anything of the body is read; then 503 while draining."""

    def __init__(self, app: ASGIApp, context: ApiContext) -> None:
        self._app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._check(scope)
        await self._app(scope, receive, send)

    async def _check(self, scope: Scope) -> None:
        role = required_role(scope["path"])
        if role is not None:
            caller = await self._context.authenticator.authenticate(Headers(scope=scope).get("authorization"))
            scope["state"]["record"].caller = caller = replace(caller, address=_peer(scope))
            if role not in caller.roles:
                raise PermissionDenied(f"this route is for the role {role}")
        if self._context.lifecycle.draining and scope["path"] not in _ALWAYS_ANSWERED:
            raise Draining("the server is shutting down")


def _peer(scope: Scope) -> str:
    """The address that the request comes from, for the audit log; nothing is decided by it."""
    client = scope.get("client")
    return str(client[0]) if client else ""


class BodyLimit:
    """413 for a body beyond the cap of its path, by its Content-Length or while it comes in."""

    def __init__(self, app: ASGIApp, context: ApiContext) -> None:
        self._app = app
        self._caps = context.caps

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._caps.upload_bytes if scope["path"] == _UPLOAD_PATH else self._caps.body_bytes
        length = Headers(scope=scope).get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        received = 0

        async def receive_within_limit() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise _too_large(limit)
            return message

        await self._app(scope, receive_within_limit, send)


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body is larger than {limit} bytes")
