"""`/openapi.json`: what FastAPI derives, plus the bodies that the routes parse themselves, less what cannot happen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from serving.api import schemas
from serving.api.errors import ErrorReply
from serving.api.fields import NoEffect
from serving.api.schemas import RequestModel

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorReply, "description": "Any error; never 422."}
}
UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", "config", "weights"],
                    "properties": {
                        "name": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"},
                        "config": {"type": "string", "format": "binary", "description": "adapter_config.json"},
                        "weights": {"type": "string", "format": "binary", "description": "adapter_model.safetensors"},
                    },
                }
            }
        },
    }
}
_BODIES: tuple[type[RequestModel], ...] = (
    schemas.ActivateBody,
    schemas.ChatBody,
    schemas.CompletionBody,
    schemas.DetokenizeBody,
    schemas.LoadAdapterBody,
    schemas.SetAdapterBody,
    schemas.TokenizeBody,
    schemas.UnloadAdapterBody,
)
_REF = "#/components/schemas/{model}"


def request_body(model: type[RequestModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route whose JSON body is a `model`."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def install_openapi(app: FastAPI) -> None:
    """Make `app.openapi()` and `/openapi.json` tell of all bodies."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _build(app)
        return app.openapi_schema

    # FastAPI documents replacing this method as the way to extend the specification.
    app.openapi = openapi  # type: ignore[method-assign]


def _build(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, definitions = models_json_schema([(model, "validation") for model in _BODIES], ref_template=_REF)
    components = document.setdefault("components", {}).setdefault("schemas", {})
    components.update(definitions["$defs"])
    for model in _BODIES:
        if model.unsupported:
            components[model.__name__]["description"] += "\n\n" + _published(model.unsupported)
    return document


def _published(unsupported: Mapping[str, NoEffect]) -> str:
    entries = (
        f"`{name}`" + (" (may be " + " or ".join(map(repr, accepted)) + ")" if accepted else "")
        for name, accepted in sorted(unsupported.items())
    )
    return "Known fields that are refused unless null or without effect: " + ", ".join(entries) + "."
