"""`/openapi.json`: what FastAPI derives, plus the bodies that the routes parse themselves, errors, headers, examples.

Knows no context: the document depends on the routes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from serving.api.errors import ErrorReply, error_body
from serving.api.fields import NoEffect, RequestModel
from serving.api.operations import EVERY_ERROR, EVERYWHERE, NAME_SCHEMA, OPERATIONS, PARAMETERS, WITH_A_KEY, Operation
from serving.errors import ServingError

# Any `default` keeps FastAPI from documenting 422; the document names the real statuses in its place.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorReply, "description": "Any error."}}
UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The two files that PEFT writes, and a name.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", "config", "weights"],
                    "additionalProperties": False,
                    "properties": {
                        "name": {
                            **NAME_SCHEMA,
                            "description": "The adapter's name.",
                            "examples": ["saltspoke"],
                        },
                        "config": {
                            "type": "string",
                            "format": "binary",
                            "description": "adapter_config.json",
                        },
                        "weights": {
                            "type": "string",
                            "format": "binary",
                            "description": "adapter_model.safetensors",
                        },
                        "bank": {
                            "type": "string",
                            "pattern": "^sha256:[0-9a-f]{64}$",
                            "description": "The hash of a vector bank, for weights without one: that of an adapter of "
                            "the caller's own, or of a shared one. The bytes of the whole adapter count.",
                        },
                    },
                }
            }
        },
    }
}
TAGS = [
    {"name": "generation", "description": "Text from the base model, or from it with an adapter."},
    {"name": "models", "description": "What can be asked, and how texts become tokens."},
    {"name": "adapters", "description": "Which adapters there are, their revisions, and the tenant's default."},
    {"name": "tenants", "description": "Who may call, with which keys and limits, and the log of changes: operators."},
    {"name": "server", "description": "Is the server well, and what is it doing."},
]
_REF = "#/components/schemas/{model}"
_HEADERS: dict[str, dict[str, Any]] = {
    "RequestId": {
        "description": "The request's id, its own `X-Request-Id` if that was a fit one.",
        "required": True,
        "schema": {"type": "string"},
    },
    "Adapter": {
        "description": "What answered: `name@revision`, or `base`.",
        "required": True,
        "schema": {"type": "string"},
    },
    "RetryAfter": {"description": "Seconds.", "required": True, "schema": {"type": "string", "pattern": "^[0-9]+$"}},
    "RateLimitLimit": {
        "description": "The tenant's quota a minute, of requests or of tokens, where it has one.",
        "schema": {"type": "string", "pattern": "^[0-9]+$"},
    },
    "RateLimitRemaining": {
        "description": "What is left of it, less what running requests may still use.",
        "schema": {"type": "string", "pattern": "^[0-9]+$"},
    },
    "RateLimitReset": {
        "description": "How long until all of it is left again, such as `350ms` or `1m30s`.",
        "schema": {"type": "string"},
    },
    "WwwAuthenticate": {"description": "`Bearer`.", "required": True, "schema": {"type": "string"}},
}
_STREAM: dict[str, Any] = {
    "itemSchema": {
        "description": "A server-sent event, with `stream`; its data are JSON, or `[DONE]` at the end.",
        "type": "object",
        "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
        "required": ["data"],
    }
}
RATE_HEADERS = tuple(
    f"x-ratelimit-{what}-{kind}" for kind in ("requests", "tokens") for what in ("limit", "remaining", "reset")
)
_bodies: dict[str, type[RequestModel]] = {}


def request_body(model: type[RequestModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route whose JSON body is a `model`."""
    _bodies[model.__name__] = model
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def body_model(name: str) -> type[RequestModel]:
    """The body that some route's `request_body` was made for, by the name of its schema."""
    return _bodies[name]


def install_openapi(app: FastAPI, *, keyed: bool) -> None:
    """Make `app.openapi()` and `/openapi.json` tell of all bodies, and of keys on a server that is `keyed`."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _build(app)
            if keyed:
                _describe_security(app.openapi_schema)
        return app.openapi_schema

    # FastAPI documents replacing this method as the way to extend the specification.
    app.openapi = openapi  # type: ignore[method-assign]


def _build(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=TAGS
    )
    document["components"]["headers"] = _HEADERS
    document["components"]["examples"] = {
        error.code: {"value": error_body(error(_summary(error)))} for error in EVERY_ERROR
    }
    document["components"]["schemas"] |= _body_schemas()
    for entry in _operations(document):
        operation = OPERATIONS.get(entry["operationId"], Operation())
        _describe_parameters(entry)
        _describe_success(entry, operation)
        _describe_errors(entry, operation)
    return document


def _describe_security(document: dict[str, Any]) -> None:
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for entry in _operations(document):
        if not OPERATIONS.get(entry["operationId"], Operation()).public:
            entry["security"] = [{"key": []}]


def _operations(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        yield from path.values()


def _body_schemas() -> dict[str, Any]:
    _, definitions = models_json_schema([(model, "validation") for model in _bodies.values()], ref_template=_REF)
    schemas: dict[str, Any] = definitions["$defs"]
    for name, model in _bodies.items():
        if model.unsupported:
            schemas[name]["description"] += "\n\n" + _published(model.unsupported)
    return schemas


def _published(unsupported: Mapping[str, NoEffect]) -> str:
    entries = (
        f"`{name}`" + (" (may be " + " or ".join(map(repr, accepted)) + ")" if accepted else "")
        for name, accepted in sorted(unsupported.items())
    )
    return "Known fields that are refused unless null or without effect: " + ", ".join(entries) + "."


def _describe_parameters(entry: dict[str, Any]) -> None:
    for parameter in entry.get("parameters", ()):
        parameter |= PARAMETERS.get(parameter["name"], {})


def _describe_success(entry: dict[str, Any], operation: Operation) -> None:
    if operation.examples:
        examples = {name: {"value": value} for name, value in operation.examples.items()}
        entry["requestBody"]["content"]["application/json"]["examples"] = examples
    for status, response in entry["responses"].items():
        if status != "default":
            rated = ["X-VBLoRA-Adapter", *RATE_HEADERS] if operation.generating else []
            response["headers"] = _headers("X-Request-Id", *rated)
            if operation.streams:
                response["content"]["text/event-stream"] = _STREAM


def _describe_errors(entry: dict[str, Any], operation: Operation) -> None:
    entry["responses"].pop("default", None)
    errors = {*EVERYWHERE, *(() if operation.public else WITH_A_KEY), *operation.errors}
    by_status: dict[int, list[type[ServingError]]] = {}
    for error in sorted(errors, key=lambda error: (error.status, error.code)):
        by_status.setdefault(error.status, []).append(error)
    entry["responses"] |= {str(status): _error_response(status, errors) for status, errors in by_status.items()}
    if operation.generating:
        entry["responses"]["429"]["headers"] |= _headers(*RATE_HEADERS)


def _error_response(status: int, errors: list[type[ServingError]]) -> dict[str, Any]:
    extra = {HTTPStatus.UNAUTHORIZED: "WWW-Authenticate", HTTPStatus.TOO_MANY_REQUESTS: "Retry-After"}
    extra[HTTPStatus.SERVICE_UNAVAILABLE] = "Retry-After"
    content = {
        "schema": {"$ref": _REF.format(model=ErrorReply.__name__)},
        "examples": {error.code: {"$ref": f"#/components/examples/{error.code}"} for error in errors},
    }
    return {
        "description": "\n\n".join(f"`{error.code}`: {_summary(error)}" for error in errors),
        "headers": _headers("X-Request-Id", *([extra[HTTPStatus(status)]] if status in extra else [])),
        "content": {"application/json": content},
    }


def _summary(error: type[ServingError]) -> str:
    return " ".join((error.__doc__ or "").split())


def _headers(*names: str) -> dict[str, Any]:
    of = {"X-Request-Id": "RequestId", "X-VBLoRA-Adapter": "Adapter", "Retry-After": "RetryAfter"}
    of["WWW-Authenticate"] = "WwwAuthenticate"
    of |= {name: "RateLimit" + name.split("-")[2].title() for name in RATE_HEADERS}
    return {name: {"$ref": f"#/components/headers/{of[name]}"} for name in names}
