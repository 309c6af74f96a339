"""Requests beside one another: changes under way harm no stream, and a client that leaves leaves nothing behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.api.context import ApiContext
from tests.integration.api.conftest import BASE, Files, Server, Stream, running


def test_an_upload_harms_none_of_twenty_streams(files: Files, tmp_path: Path) -> None:
    shared = tuple(f"a{number}={files.adapter(number)}" for number in range(2))
    requests = [{"model": (BASE, "a0", "a1")[n % 3], "prompt": f"{n} foxes", "max_tokens": 120} for n in range(20)]
    with running(files, tmp_path, adapter=shared) as server:
        quiet = [stream.result() for stream in [Stream(server, **request) for request in requests]]
        speed_up = _slow_down(server)
        streams = [Stream(server, **request) for request in requests]
        for stream in streams:
            stream.wait_for_text()
        assert server.client.post("/v1/adapters", **files.upload("new", 4)).status_code == 201
        answer = server.complete(model="new", max_tokens=4)
        running_then = sum(stream.running for stream in streams)
        speed_up()
        assert answer.status_code == 200
        assert answer.headers["X-VBLoRA-Adapter"].startswith("new@")
        assert [stream.result() for stream in streams] == quiet
        assert running_then == 20, "the streams ended before the upload had served: they show nothing"
        assert server.text(model="new", max_tokens=4) == answer.json()["choices"][0]["text"]


def test_a_replaced_or_deleted_adapter_serves_its_running_requests(server: Server, files: Files) -> None:
    """Seen to fail where `Residency` drops a retired adapter that is pinned."""
    try:
        server.client.post("/v1/adapters", **files.upload("mine", 2))
        old = server.text(model="mine", max_tokens=240)
        content = server.context.catalog.pin("default", "mine")
        content.release()
        first = Stream(server, model="mine", max_tokens=240)
        first.wait_for_text()
        second = server.client.post("/v1/adapters", **files.upload("mine", 3)).json()
        new = server.complete(model="mine")
        assert new.headers["X-VBLoRA-Adapter"] == f"mine@{second['revision']}" != first.headers["X-VBLoRA-Adapter"]
        third = Stream(server, model="mine", max_tokens=240)
        third.wait_for_text()
        server.client.delete("/v1/adapters/mine")
        assert server.complete(model="mine").status_code == 404
        assert first.running, "the stream ended before its adapter was replaced and deleted: it shows nothing"
        assert first.result() == old
        assert third.result().startswith(new.json()["choices"][0]["text"])
        server.wait_until_idle()
        assert server.context.engine.residency.pins(content.content_hash) == 0
        assert content.content_hash not in server.context.engine.residency
    finally:
        server.client.delete("/v1/adapters/mine")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_everything_within_a_second(
    files: Files, tmp_path: Path, path: str, stream: bool
) -> None:
    """Seen to fail where `EngineCore.abort` ends nothing."""
    with running(files, tmp_path, adapter=(f"a0={files.adapter(0)}",)) as server:
        _slow_down(server)
        body: dict[str, Any] = {"model": "a0", "max_tokens": 200, "ignore_eos": True, "stream": stream}
        prompts = ["the fox", "a dog"]
        body |= {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": prompts}
        rows = 1 if "chat" in path else 2
        with httpx.Client(base_url=server.url, timeout=httpx.Timeout(10, read=0.5)) as client:
            if stream:
                with client.stream("POST", path, json=body) as response:
                    next(response.iter_lines())
                    stats = server.context.engine.stats()
                    assert stats.requests_running + stats.requests_waiting == rows
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(path, json=body)
                assert server.context.engine.stats().requests_running == rows
        server.wait_until_idle(within=1.0)
        revision = server.context.catalog.pin("default", "a0")
        revision.release()
        assert server.context.engine.residency.pins(revision.content_hash) == 0
        assert server.context.engine.stats().kv_blocks_used == 0


def test_queues_are_bounded_and_what_was_taken_finishes(files: Files, tmp_path: Path) -> None:
    """Seen to fail without the two bounds in `Engine._check_admission`."""
    with running(files, tmp_path, max_batch_size=2, max_queue=2, max_queue_per_tenant=2) as server:
        _slow_down(server)
        streams = [Stream(server, max_tokens=40) for _ in range(2)]
        for stream in streams:
            stream.wait_for_text()
        refused = server.complete(prompt=["a", "b", "c"])
        assert refused.status_code in (429, 503)
        assert refused.json()["error"]["code"] in ("rate_limit_exceeded", "overloaded")
        assert int(refused.headers["Retry-After"]) >= 1
        assert [bool(stream.result()) for stream in streams] == [True, True]
        assert server.complete(prompt=["a", "b"]).is_success
        rejections = [line for line in server.client.get("/metrics").text.splitlines() if "rejections_total{" in line]
        assert len(rejections) == 1
        server.wait_until_idle()


def test_a_dead_engine_is_told_to_streams_waiters_and_probes(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path) as server:
        _slow_down(server)
        with server.client.stream("POST", "/v1/completions", json=_long()) as response:
            lines = response.iter_lines()
            next(lines)
            server.context.engine.close(10)
            rest = [line for line in lines if line]
        assert '"error"' in rest[-1]
        assert '"internal_error"' in rest[-1]
        assert not any("[DONE]" in line for line in rest)
        assert server.client.get("/health/live").status_code == 200
        for path in ("/health/ready", "/health"):
            assert server.client.get(path).json()["error"]["code"] == "engine_unavailable"
        refused = server.complete()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
        assert refused.headers["Retry-After"]


def test_draining_refuses_new_work_and_finishes_the_old(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path) as server:
        quiet = server.text(max_tokens=200)
        stream = Stream(server)
        stream.wait_for_text()
        context: ApiContext = server.context
        context.lifecycle.drain()
        refused = server.complete()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.json()["error"]["type"] == "server_error"
        assert refused.headers["Retry-After"]
        assert server.client.post("/v1/adapters", **files.upload("x", 1)).status_code == 503
        assert server.client.get("/health/live").status_code == 200
        assert [server.client.get(path).status_code for path in ("/health", "/health/ready")] == [503, 503]
        assert server.client.get("/metrics").status_code == 200
        assert stream.result() == quiet


def test_ended_generations_are_told_so(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path) as server:
        _slow_down(server)
        with server.client.stream("POST", "/v1/completions", json=_long()) as response:
            lines = response.iter_lines()
            next(lines)
            server.context.lifecycle.end_generations()
            rest = [line for line in lines if line]
        assert '"draining"' in rest[-1]
        server.wait_until_idle()


def _long() -> dict[str, Any]:
    return {"model": BASE, "prompt": "the fox", "max_tokens": 250, "ignore_eos": True, "stream": True}


def _slow_down(server: Server) -> Callable[[], None]:
    """Make every step take 30 ms longer, as that of a larger model does, until the function returned is called."""
    runner: Any = server.context.engine.runner  # type: ignore[attr-defined]
    run = runner.run

    def slow(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(0.03)
        return run(*arguments, **keywords)

    def restore() -> None:
        runner.run = run

    runner.run = slow
    return restore
