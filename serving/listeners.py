"""Sockets that the server listens on: bound early; those beside uvicorn's own served for as long as a block runs.

Knows no routes.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from serving.errors import StartupError


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet, taken before the model is loaded so that a taken port is known at once.

    Raises `StartupError`.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StartupError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return listener


def configured(app: ASGIApp, **settings: Any) -> uvicorn.Config:
    """What all listeners have in common, with `settings` of one's own."""
    return uvicorn.Config(
        app,
        http="h11",  # which bounds a request's head; httptools, uvicorn's choice where it is installed, does not
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
        **settings,
    )


class _Beside(uvicorn.Server):
    """uvicorn, but signals are another server's."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def served(app: ASGIApp, listener: socket.socket) -> AsyncIterator[None]:
    """Serve `app` on `listener`, plain HTTP, until the block ends."""
    server = _Beside(configured(app, lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving
