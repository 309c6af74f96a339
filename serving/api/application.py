"""The FastAPI application over an `ApiContext`: routes, layers and error mapping, in one place and in order."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match
from starlette.types import Scope

from serving.api import adapters, admin, docs, embeddings, generate, health, models, responses, usage
from serving.api.context import ApiContext
from serving.api.errors import install_error_handlers
from serving.api.generate import ADAPTER_HEADER
from serving.api.middleware import REQUEST_ID_HEADER, Access, BodyLimit, HostCheck, RequestScope
from serving.api.openapi import ERROR_RESPONSES, RATE_HEADERS, install_openapi

ROUTERS: tuple[APIRouter, ...] = (
    generate.router,
    responses.router,
    embeddings.router,
    models.router,
    adapters.router,
    admin.router,
    usage.router,
    health.router,
    docs.router,
)
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def build_application(context: ApiContext, lifespan: Lifespan, cors_origins: Sequence[str] = ()) -> FastAPI:
    """The application; `lifespan` brackets its time of service."""
    app = _routes(context.version, keyed=context.keyed, lifespan=lifespan, middleware=_layers(context, cors_origins))
    app.state.context = context
    app.state.methods_of = methods_of
    install_error_handlers(app)
    return app


def build_admin_application(context: ApiContext) -> FastAPI:
    """Metrics and health only, for a listener of their own: nobody is asked for a key there."""
    layers = [Middleware(RequestScope, context=context), Middleware(HostCheck, context=context)]
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, middleware=layers)
    app.include_router(health.router)
    app.state.context = context
    app.state.methods_of = methods_of
    install_error_handlers(app)
    return app


def specification(version: str) -> str:
    """The text of `/openapi.json` for people to read and to compare: keys in order, one newline at the end."""
    return json.dumps(_routes(version).openapi(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _routes(version: str, *, keyed: bool = False, **options: Any) -> FastAPI:
    app = FastAPI(
        title="VB-LoRA inference server",
        version=version,
        description="One base model, many VB-LoRA adapters, OpenAI's routes.",
        openapi_url=docs.SPECIFICATION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        responses=ERROR_RESPONSES,
        **options,
    )
    for router in ROUTERS:
        app.include_router(router)
    install_openapi(app, keyed=keyed)
    return app


def methods_of(scope: Scope) -> set[str]:
    """Every method that some route takes on the path of `scope`."""
    routes = [route for router in ROUTERS for route in router.routes if route.matches(scope)[0] is not Match.NONE]
    return {method for route in routes for method in getattr(route, "methods", None) or ()}


def _layers(context: ApiContext, cors_origins: Sequence[str]) -> list[Middleware]:
    """Outermost first."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(cors_origins),
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=[REQUEST_ID_HEADER, ADAPTER_HEADER, *RATE_HEADERS],
    )
    return [
        Middleware(RequestScope, context=context),
        *([cors] if cors_origins else []),
        Middleware(HostCheck, context=context),
        Middleware(Access, context=context),
        Middleware(BodyLimit, context=context),
    ]
