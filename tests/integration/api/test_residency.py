"""Adapters that come into memory and leave it while a server runs: what is slow to read, and the watched folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest

from serving import upkeep
from serving.adapters.storage.revisions import RevisionStorage
from tests.integration.api.conftest import Files, Server, running
from tests.integration.api.keyed import keyed

FLOOD = 60  # more than the process has threads for such work
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Callers:
    """A server that keeps no adapter which no request uses, and a client of each tenant."""

    server: Server
    acme: httpx.Client
    ops: httpx.Client


@pytest.fixture(scope="module")
def callers(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callers]:
    with (
        keyed(files, tmp_path_factory.mktemp("keyed"), adapter_memory="0") as started,
        started.client("acme") as acme,
        started.client("ops") as ops,
    ):
        yield Callers(started.server, acme, ops)


def within(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def value(client: httpx.Client, name: str) -> float:
    line = next(line for line in client.get("/metrics").text.splitlines() if line.startswith(f"vblora_{name} "))
    return float(line.split()[-1])


def complete(client: httpx.Client, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "the fox", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    return client.post("/v1/completions", json=body)


def test_a_tenant_whose_adapters_are_slow_to_read_holds_up_no_other(
    callers: Callers, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails where requests of all tenants wait for the same threads."""
    acme, ops = callers.acme, callers.ops
    acme.post("/v1/adapters", **files.upload("slow", 2))
    assert ops.post("/v1/adapters", **files.upload("fast", 3)).status_code == 201
    go, reading, get = Event(), Event(), RevisionStorage.get
    slow = callers.server.context.catalog.pin("acme", "slow")
    slow.release()

    def slow_get(self: RevisionStorage, content_hash: str) -> Any:
        if content_hash == slow.content_hash:
            reading.set()
            assert go.wait(60)
        return get(self, content_hash)

    monkeypatch.setattr(RevisionStorage, "get", slow_get)
    with ThreadPoolExecutor(FLOOD) as pool:
        try:
            flood = [pool.submit(complete, acme, "slow") for _ in range(FLOOD)]
            assert reading.wait(20)
            within(lambda: callers.server.context.lifecycle.in_flight == FLOOD)
            ops.timeout = httpx.Timeout(15)
            assert complete(ops, "fast").status_code == 200
            assert ops.post("/v1/adapters", **files.upload("more", 4)).status_code == 201
            assert ops.get("/v1/adapters").status_code == 200
            assert not any(future.done() for future in flood)
        finally:
            go.set()
        assert {future.result().status_code for future in flood} == {200}
    assert len(callers.server.context.threads) == 0


def test_what_no_request_uses_leaves_memory_and_comes_back(callers: Callers, files: Files) -> None:
    acme, ops = callers.acme, callers.ops
    acme.post("/v1/adapters", **files.upload("cold", 1))
    evictions = 'adapter_evictions_total{tier="resident"}'
    before = value(ops, evictions)
    texts = {complete(acme, "cold").json()["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 1
    within(lambda: value(ops, "adapters_resident") == 0)
    assert value(ops, evictions) == before + 3
    assert value(ops, "adapter_resident_bytes") == value(ops, "bank_bytes") == 0
    assert not acme.get("/v1/adapters/cold").json()["resident"]


def test_a_watched_folder_is_served_while_it_changes(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "WATCH_SECONDS", POLL_SECONDS)
    watched = tmp_path / "watched"
    watched.mkdir()
    shutil.copytree(files.adapter(0), watched / "dropped")
    with running(files, tmp_path / "data", adapters_dir=watched) as server:

        def revision() -> str | None:
            reply = server.complete(model="dropped")
            return reply.headers["X-VBLoRA-Adapter"] if reply.status_code == 200 else None

        within(lambda: revision() is not None)
        first = revision()
        shutil.copytree(files.adapter(1), watched / "dropped", dirs_exist_ok=True)
        within(lambda: revision() not in (first, None))
        assert len(server.client.get("/v1/adapters/dropped").json()["revisions"]) == 2
        shutil.rmtree(watched)  # as if it was unmounted
        time.sleep(4 * POLL_SECONDS)
        assert revision() is not None
        watched.mkdir()
        within(lambda: revision() is None)
        shutil.copytree(files.adapter(1), watched / "dropped")
        within(lambda: revision() is not None)
    shutil.rmtree(watched / "dropped")
    with running(files, tmp_path / "data", adapters_dir=watched) as server:
        within(lambda: server.complete(model="dropped").status_code == 404)
