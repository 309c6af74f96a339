"""What every listener does, on a real socket."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import anyio
import pytest
from starlette.responses import PlainTextResponse

from serving.listeners import bind, served

MOST_HEAD = 128 * 1024  # twice what h11 takes


def asked(ask: Callable[[socket.socket], bytes]) -> bytes:
    """What `ask` got from a listener that answers "hello"."""
    with bind("127.0.0.1", 0) as listener, ThreadPoolExecutor(1) as pool:

        def connect() -> bytes:
            with socket.create_connection(listener.getsockname(), timeout=30) as client:
                return ask(client)

        async def serve() -> bytes:
            async with served(PlainTextResponse("hello"), listener):
                while True:
                    try:
                        return await anyio.to_thread.run_sync(lambda: pool.submit(connect).result())
                    except ConnectionRefusedError:
                        await anyio.sleep(0.01)

        return anyio.run(serve)


def test_it_answers() -> None:
    def ask(client: socket.socket) -> bytes:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return b"".join(iter(lambda: client.recv(4096), b""))

    assert asked(ask).endswith(b"hello")


def test_a_head_without_end_is_not_kept() -> None:
    """Seen to fail with httptools, which takes megabytes of it."""

    def ask(client: socket.socket) -> bytes:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        sent = 0
        client.settimeout(0.2)
        while sent < MOST_HEAD:
            client.sendall(b"a: " + b"b" * 4000 + b"\r\n")
            sent += 4005
            try:
                return client.recv(4096)
            except TimeoutError:
                continue
        pytest.fail(f"{sent} bytes were taken")

    assert asked(ask).startswith(b"HTTP/1.1 400 ")
