"""Exceptions → the one error body of the API. Nothing else builds an error reply; knows no engine and no catalog."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serving.errors import InternalError, InvalidValue, MethodNotAllowed, NotFound, ServingError

_RETRY_SECONDS = 1
CLIENT_CLOSED_REQUEST = 499


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(BaseModel):
    """Every error, on every route."""

    error: ErrorDetail


def error_body(error: ServingError) -> dict[str, Any]:
    """The JSON of an error, for a reply or for a line of a stream."""
    detail = ErrorDetail(message=error.message, type=error.type, param=error.param, code=error.code)
    return ErrorReply(error=detail).model_dump()


def error_response(error: ServingError) -> Response:
    """The reply to a request that failed with `error`, its headers included."""
    headers: dict[str, str] = {}
    if error.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        headers["Retry-After"] = str(error.retry_after or _RETRY_SECONDS)
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


def validation_error(errors: Sequence[Any], *, skip: int = 0) -> InvalidValue:
    """The first of pydantic's `errors` as one sentence; its place, without the first `skip` steps, is the param."""
    first = errors[0]
    place = [*first["loc"][skip:], *([first["ctx"]["field"]] if first["type"] == "fault" else [])]
    param = ".".join(str(step) for step in place) or None
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return InvalidValue(f"{param or 'body'}: {message}", param=param)


def install_error_handlers(app: FastAPI) -> None:
    """Map every class of exception that a route can raise."""
    app.add_exception_handler(ServingError, _on_serving_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_request_validation)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)


def _respond(request: Request, error: ServingError) -> Response:
    request.state.record.fail(error)
    return error_response(error)


async def _on_serving_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ServingError):
        raise error
    return _respond(request, error)


async def _on_request_validation(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    return _respond(request, validation_error(error.errors(), skip=1))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == HTTPStatus.NOT_FOUND:
        return _respond(request, NotFound(f"there is no route {request.url.path}"))
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        return _method_not_allowed(request)
    if error.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
        return _respond(request, InvalidValue(str(error.detail)))
    return _respond(request, InternalError("internal error"))


def _method_not_allowed(request: Request) -> Response:
    allowed = ", ".join(sorted(request.app.state.methods_of(request.scope)))
    response = _respond(request, MethodNotAllowed(f"{request.method} is not allowed here; allowed: {allowed}"))
    response.headers["Allow"] = allowed
    return response
