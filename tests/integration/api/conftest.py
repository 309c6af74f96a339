"""A real application over a real engine on a tiny random model, behind a real socket, for the tests of this folder."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from serving.api.context import ApiContext
from serving.app import create_app
from serving.listeners import configured
from serving.settings import ServerSettings
from tests.support import save_random_adapter, save_tiny_model, tiny_model

BASE = "tiny"
ADAPTERS = 5
CACHE_BYTES = 1 << 26  # the default would take much of the machine's memory, once for each server


@dataclass(frozen=True)
class Files:
    """What a test needs on disk: the base model and adapters ``a0`` … ``a4``, all different."""

    model: Path
    root: Path

    def adapter(self, number: int) -> Path:
        return self.root / f"a{number}"

    def upload(self, name: str, number: int) -> dict[str, Any]:
        """The arguments of the request that uploads adapter `number` under `name`."""
        return upload_of(name, self.adapter(number))


def upload_of(name: str, folder: Path) -> dict[str, Any]:
    config = (folder / "adapter_config.json").read_bytes()
    weights = (folder / "adapter_model.safetensors").read_bytes()
    return {"data": {"name": name}, "files": {"config": config, "weights": weights}}


@dataclass(frozen=True)
class Server:
    """A running server: its address, its parts, and a client."""

    url: str
    context: ApiContext
    client: httpx.Client

    def post(self, path: str, body: dict[str, Any], **arguments: Any) -> httpx.Response:
        return self.client.post(path, json=body, **arguments)

    def complete(self, **fields: Any) -> httpx.Response:
        """A short greedy completion; `fields` are added or replaced."""
        defaults = {"model": BASE, "prompt": "the fox", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        return self.post("/v1/completions", defaults | fields)

    def text(self, **fields: Any) -> str:
        reply = self.complete(**fields)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["text"])

    def wait_until_idle(self, within: float = 1.0) -> None:
        deadline = time.monotonic() + within
        while busy := self._busy():
            assert time.monotonic() < deadline, f"still {busy} after {within} s"
            time.sleep(0.01)

    def _busy(self) -> list[int]:
        """Requests running, waiting and in HTTP, if there are any."""
        stats = self.context.engine.stats()
        counts = [stats.requests_running, stats.requests_waiting, self.context.lifecycle.in_flight]
        return counts if any(counts) else []


class Stream:
    """A streaming completion that is read on a thread of its own, as other clients are while a test goes on."""

    def __init__(self, server: Server, key: str | None = None, **fields: Any) -> None:
        body = {"model": BASE, "prompt": "the fox", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
        self._body = body | fields | {"stream": True}
        self._server = server
        self._key = {"Authorization": f"Bearer {key}"} if key else {}
        self.started = threading.Event()
        self.texts: list[str] = []
        self.lines: list[str] = []
        self.headers: httpx.Headers = httpx.Headers()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        url = f"{self._server.url}/v1/completions"
        with httpx.stream("POST", url, json=self._body, headers=self._key, timeout=60) as response:
            self.headers = response.headers
            for line in filter(None, response.iter_lines()):
                self.lines.append(line)
                if line != "data: [DONE]":
                    self.texts.append(json.loads(line[6:])["choices"][0]["text"])
                self.started.set()

    def wait_for_text(self) -> None:
        assert self.started.wait(20)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> str:
        """The whole text, once the stream has ended as it should."""
        self._thread.join(60)
        assert self.lines[-1] == "data: [DONE]"
        return "".join(self.texts)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("tiny-files")
    save_tiny_model(folder / BASE)
    model = tiny_model()
    for number in range(ADAPTERS):
        rank, topk = ((2, 2), (4, 3), (8, 2))[number % 3]
        save_random_adapter(folder / "adapters" / f"a{number}", model, rank=rank, topk=topk, seed=number)
    return Files(folder / BASE, folder / "adapters")


@contextmanager
def running(files: Files, data_dir: Path, **settings: Any) -> Iterator[Server]:
    """A server in this process, stopped with the block."""
    given = {"data_dir": data_dir, "adapter_root": (files.root,), "port": 0, "kv_cache_memory": CACHE_BYTES} | settings
    app = create_app(ServerSettings(model=str(files.model), **given))
    server = uvicorn.Server(configured(app, port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Server(url, app.state.context, client)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server a module, with ``a0`` and ``a1`` as shared adapters. Tests leave no other adapter and no default."""
    shared = tuple(f"a{number}={files.adapter(number)}" for number in range(2))
    with running(files, tmp_path_factory.mktemp("data"), adapter=shared) as started:
        yield started


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test may leave a request, a pin or a default adapter behind."""
    yield
    if "server" in request.fixturenames:
        server: Server = request.getfixturevalue("server")
        server.wait_until_idle(2.0)
        assert [entry.name for entry in server.context.catalog.list("default")] == ["a0", "a1"]
        assert server.context.catalog.pin_default("default") is None
