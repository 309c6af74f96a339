"""`/health…`, `/version` and `/metrics`. Live means that the process answers, ready that it takes work."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from serving.api.context import ApiContext, Context
from serving.api.replies import HealthReply, VersionReply
from serving.errors import Draining, EngineUnavailable

router = APIRouter(tags=["server"])


@router.get("/health/live")
async def live() -> HealthReply:
    """200 for as long as the process answers."""
    return HealthReply(status="live")


@router.get("/health/ready")
async def ready(context: Context) -> HealthReply:
    """200 when requests are taken, else 503."""
    return _ready(context)


@router.get("/health")
async def health(context: Context) -> HealthReply:
    """The same as `/health/ready`."""
    return _ready(context)


@router.get("/version")
async def version(context: Context) -> VersionReply:
    """The server's version."""
    return VersionReply(version=context.version)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(context: Context) -> Response:
    """Prometheus text."""
    return Response(generate_latest(context.registry), media_type=CONTENT_TYPE_LATEST)


def _ready(context: ApiContext) -> HealthReply:
    if context.lifecycle.draining:
        raise Draining("the server is shutting down")
    if not context.engine.healthy:
        raise EngineUnavailable("the engine is not running")
    return HealthReply(status="ready")
