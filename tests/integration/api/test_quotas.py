"""Quotas over HTTP: what is refused and told, and that nothing of it stays behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.tenancy.quotas import TenantQuotas
from tests import redis
from tests.integration.api.conftest import BASE, Files, Server, Stream, running
from tests.integration.api.test_traffic import _slow_down

RATES = [f"x-ratelimit-{what}-{kind}" for kind in ("requests", "tokens") for what in ("limit", "remaining", "reset")]
CHAT: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
RESPONSE: dict[str, Any] = {"model": BASE, "input": "x", "max_output_tokens": 4}
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"model": BASE, "prompt": "x", "max_tokens": 4}),
    ("/v1/completions", {"model": BASE, "prompt": "x", "max_tokens": 4, "stream": True}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"stream": True}),
    ("/v1/responses", RESPONSE),
    ("/v1/responses", RESPONSE | {"stream": True}),
    ("/v1/embeddings", {"model": BASE, "input": "x"}),
]


def at_work(server: Server) -> int:
    quotas = server.context.quotas
    assert isinstance(quotas, TenantQuotas)
    return quotas.at_work("default")


def error(reply: httpx.Response) -> tuple[int, str, str | None]:
    body = reply.json()["error"]
    return reply.status_code, body["code"], body["param"]


def rejections(server: Server) -> dict[str, float]:
    lines = server.client.get("/metrics").text.splitlines()
    name = "vblora_admission_rejections_total{reason="
    return {line.split('"')[1]: float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)}


def test_every_generating_route_tells_of_the_rates_and_is_refused_over_them(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path, requests_per_minute=len(ROUTES), tokens_per_minute=10_000) as server:
        for left, (path, body) in zip(reversed(range(len(ROUTES))), ROUTES, strict=True):
            reply = server.post(path, body)
            assert reply.status_code == 200, reply.text
            assert reply.headers["x-ratelimit-limit-requests"] == str(len(ROUTES))
            assert reply.headers["x-ratelimit-remaining-requests"] == str(left)
            assert set(RATES) <= set(reply.headers)
        for path, body in ROUTES:
            reply = server.post(path, body)
            assert error(reply) == (429, "rate_limit_exceeded", None)
            assert reply.json()["error"]["type"] == "rate_limit_error"
            assert 1 <= int(reply.headers["Retry-After"]) <= 120
            assert set(RATES) <= set(reply.headers)
        assert server.client.get("/v1/models").status_code == 200
        assert "x-ratelimit-limit-requests" not in server.client.get("/v1/models").headers
        assert rejections(server) == {"requests_per_minute": len(ROUTES)}
        assert at_work(server) == 0


def test_no_quota_is_told_where_none_is_set(server: Server) -> None:
    assert not set(RATES) & set(server.complete(max_tokens=2).headers)


def test_tokens_that_were_not_generated_are_given_back(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path, tokens_per_minute=150) as server:
        used = 0
        for _ in range(3):  # each reserves 120 and more
            reply = server.complete(max_tokens=120, stop=["the", "a", "e", " "], ignore_eos=False)
            assert reply.status_code == 200, reply.text
            used += reply.json()["usage"]["total_tokens"]
            server.wait_until_idle()
        last = server.complete(max_tokens=1)
        assert int(last.headers["x-ratelimit-remaining-tokens"]) == 150 - used - last.json()["usage"]["total_tokens"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"model": BASE, "prompt": "x", "max_tokens": 60, "n": 3}, "max_tokens"),
        ("/v1/chat/completions", CHAT | {"max_tokens": 150}, "max_tokens"),
        ("/v1/responses", RESPONSE | {"max_output_tokens": 150}, "max_output_tokens"),
        ("/v1/embeddings", {"model": BASE, "input": "the fox " * 50}, "input"),
    ],
)
def test_what_could_never_fit_is_the_clients_fault(
    files: Files, tmp_path: Path, path: str, body: dict[str, Any], param: str
) -> None:
    with running(files, tmp_path, tokens_per_minute=100) as server:
        assert error(server.post(path, body)) == (400, "invalid_value", param)
        assert at_work(server) == 0


def test_an_answer_of_no_set_length_is_as_long_as_the_quotas_allow(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path, tokens_per_minute=100, max_tokens=30) as server:
        for path, body, param in (
            ("/v1/chat/completions", CHAT, "max_tokens"),
            ("/v1/responses", RESPONSE, "max_output_tokens"),
        ):
            too_long = server.post(path, body | {param: 31})
            assert error(too_long) == (400, "invalid_value", param)
            free = server.post(path, {name: body[name] for name in body if name != param} | {"ignore_eos": True})
            assert free.status_code == 200, free.text
            tokens = free.json()["usage"]
            assert tokens.get("completion_tokens", tokens.get("output_tokens")) == 30


@pytest.mark.parametrize("stream", [False, True])
def test_requests_at_a_time_are_counted_until_their_clients_leave(files: Files, tmp_path: Path, stream: bool) -> None:
    with running(files, tmp_path, concurrent_requests=2) as server:
        speed_up = _slow_down(server)
        streams = [Stream(server) for _ in range(2)]
        for entry in streams:
            entry.wait_for_text()
        refused = server.complete(stream=stream)
        assert error(refused) == (429, "rate_limit_exceeded", None)
        assert refused.headers["Retry-After"] == "1"
        assert rejections(server) == {"concurrent_requests": 1}
        speed_up()
        for entry in streams:
            entry.result()
        server.wait_until_idle()
        assert at_work(server) == 0
        _slow_down(server)
        with httpx.Client(base_url=server.url, timeout=httpx.Timeout(10, read=0.5)) as client:
            body = {"model": BASE, "prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": stream}
            if stream:
                with client.stream("POST", "/v1/completions", json=body) as response:
                    next(response.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/completions", json=body)
        server.wait_until_idle()
        assert at_work(server) == 0


def test_what_fails_after_it_was_counted_is_uncounted(files: Files, tmp_path: Path) -> None:
    """The engine's queue is full: the rate that was charged a moment before is given back."""
    with running(
        files, tmp_path, requests_per_minute=2, tokens_per_minute=1000, max_batch_size=1, max_queue_per_tenant=1
    ) as server:
        _slow_down(server)
        stream = Stream(server, max_tokens=40)
        stream.wait_for_text()
        for _ in range(5):
            refused = server.complete(prompt=["a", "b", "c"], max_tokens=2)
            assert error(refused) == (429, "rate_limit_exceeded", None)
        stream.result()
        server.wait_until_idle()
        assert server.complete(max_tokens=1).headers["x-ratelimit-remaining-requests"] == "0"
        assert rejections(server) == {"queued_requests": 5}
        assert at_work(server) == 0


def test_adapters_have_a_quota_which_shared_ones_do_not_use(files: Files, tmp_path: Path) -> None:
    shared = tuple(f"a{number}={files.adapter(number)}" for number in range(2))
    with running(files, tmp_path, adapter=shared, max_adapters=1) as server:
        first = server.client.post("/v1/adapters", **files.upload("mine", 2))
        assert first.status_code == 201
        assert server.client.post("/v1/adapters", **files.upload("mine", 3)).status_code == 201, "another revision"
        refused = server.client.post("/v1/adapters", **files.upload("more", 3))
        assert error(refused) == (429, "rate_limit_exceeded", None)
        assert rejections(server) == {"adapters": 1}
    size = first.json()["bytes"]
    with running(files, tmp_path / "other", max_adapter_bytes=2 * size - 1) as server:
        assert server.client.post("/v1/adapters", **files.upload("mine", 2)).status_code == 201
        refused = server.client.post("/v1/adapters", **files.upload("twin", 2))
        assert error(refused) == (429, "rate_limit_exceeded", None), "the same content is paid for twice"


def test_of_uploads_at_a_time_no_more_are_taken_than_fit(files: Files, tmp_path: Path) -> None:
    """Fails where the quota is checked before the registry's transaction."""
    with running(files, tmp_path, max_adapters=1) as server, ThreadPoolExecutor(5) as pool:
        names = [f"x{number}" for number in range(5)]
        replies = list(pool.map(lambda name: server.client.post("/v1/adapters", **files.upload(name, 2)), names))
        assert sorted(reply.status_code for reply in replies) == [201, 429, 429, 429, 429]
        assert len(server.client.get("/v1/adapters").json()["data"]) == 1


@pytest.mark.redis
def test_two_servers_share_a_quota_in_redis_and_go_on_without_it(files: Files, tmp_path: Path) -> None:
    with redis.running(tmp_path) as url:
        settings: dict[str, Any] = {"requests_per_minute": 2, "redis_url": url}
        with running(files, tmp_path / "one", **settings) as one, running(files, tmp_path / "two", **settings) as two:
            assert [server.complete(max_tokens=1).status_code for server in (one, two, one, two)] == [200] * 2 + [
                429
            ] * 2
    with running(files, tmp_path / "one", **settings) as server:
        assert [server.complete(max_tokens=1).status_code for _ in range(3)] == [200, 200, 429]
        failures = [
            line for line in server.client.get("/metrics").text.splitlines() if "quota_storage_errors_t" in line
        ]
        assert float(failures[-1].rpartition(" ")[2]) >= 1
