"""What surrounds the routes: health, metrics, the specification, ids, hosts, sizes, methods, unknown paths."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest

from tests.integration.api.conftest import BASE, Files, Server, running


def error_of(reply: httpx.Response) -> tuple[int, str, str | None]:
    error = reply.json()["error"]
    return reply.status_code, error["code"], error["param"]


def test_health_and_version(server: Server) -> None:
    assert server.client.get("/health/live").json() == {"status": "live"}
    assert server.client.get("/health/ready").json() == server.client.get("/health").json() == {"status": "ready"}
    assert server.client.get("/version").json() == {"version": version("vblora")}


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/", "/v1/nowhere", "/v1/models/", "/v1/completions/", "/redoc", "//v1/models"]
)
def test_unknown_routes(server: Server, path: str) -> None:
    reply = server.client.get(path, follow_redirects=False)
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] in {"not_found", "model_not_found"}
    assert reply.headers["X-Request-Id"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/adapters", "GET, POST"),
        ("POST", "/v1/adapters/a0", "DELETE, GET"),
        ("GET", "/v1/completions", "POST"),
        ("DELETE", "/v1/models/org/name", "GET"),
        ("PATCH", "/v1/adapters/a0/revisions/1", "DELETE"),
        ("POST", "/metrics", "GET"),
    ],
)
def test_a_wrong_method_is_told_all_right_ones(server: Server, method: str, path: str, allowed: str) -> None:
    reply = server.client.request(method, path)
    assert error_of(reply) == (405, "method_not_allowed", None)
    assert reply.headers["Allow"] == allowed
    assert allowed in reply.json()["error"]["message"]


def test_every_reply_has_a_request_id(server: Server) -> None:
    given = server.client.get("/version", headers={"X-Request-Id": "my.id-1_x"})
    assert given.headers["X-Request-Id"] == "my.id-1_x"
    for unfit in ("a b", "x" * 129, ""):
        reply = server.client.get("/version", headers={"X-Request-Id": unfit})
        assert reply.headers["X-Request-Id"] not in {unfit, ""}
    assert len({server.client.get("/version").headers["X-Request-Id"] for _ in range(5)}) == 5


def test_only_loopback_hosts_are_answered(server: Server) -> None:
    for host in ("127.0.0.1", "localhost", "LOCALHOST:80", "[::1]", "[::1]:8000"):
        assert server.client.get("/version", headers={"Host": host}).status_code == 200
    for host in ("example.org", "127.0.0.1.example.org", "localhost.example.org", "[::2]", "", "127.0.0.1:80@x"):
        assert error_of(server.client.get("/version", headers={"Host": host})) == (400, "invalid_value", "Host")


def test_other_hosts_are_answered_when_they_are_named(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path, allowed_hosts=("Server", "127.0.0.1")) as server:
        for host in ("server:8000", "SERVER", "127.0.0.1"):
            assert server.client.get("/version", headers={"Host": host}).status_code == 200
        for host in ("localhost", "server.example.org"):
            assert error_of(server.client.get("/version", headers={"Host": host})) == (400, "invalid_value", "Host")


@pytest.fixture
def narrow(files: Files, tmp_path: Path) -> Iterator[Server]:
    """A server that takes small bodies only."""
    with running(files, tmp_path, max_body_bytes=2000, max_upload_bytes=3000, max_prompts=2) as server:
        yield server


def test_bodies_beyond_the_cap(narrow: Server, files: Files) -> None:
    def chunks(size: int) -> Iterator[bytes]:
        yield from (b" " * 500 for _ in range(size // 500))

    headers = {"Content-Type": "application/json"}
    for path in ("/v1/completions", "/tokenize", "/v1/set_adapter"):
        told = narrow.client.post(path, content=b" " * 2001, headers=headers)
        assert error_of(told) == (413, "request_too_large", None)
        assert "2000 bytes" in told.json()["error"]["message"]
        streamed = narrow.client.post(path, content=chunks(2500), headers=headers)
        assert error_of(streamed) == (413, "request_too_large", None)
    assert error_of(narrow.client.post("/v1/completions", content=b" " * 2000, headers=headers))[0] == 400
    assert error_of(narrow.client.post("/v1/adapters", **files.upload("x", 1)))[0] == 413
    multipart = {"Content-Type": "multipart/form-data; boundary=x"}
    assert error_of(narrow.client.post("/v1/adapters", content=chunks(3500), headers=multipart))[0] == 413
    assert error_of(narrow.complete(prompt=["a", "b", "c"])) == (400, "invalid_value", "prompt")
    assert narrow.complete().is_success


def test_cors_is_off_unless_asked_for(server: Server, files: Files, tmp_path: Path) -> None:
    asked = {"Origin": "http://app.example", "Access-Control-Request-Method": "POST"}
    assert server.client.options("/v1/completions", headers=asked).status_code == 405
    assert "access-control-allow-origin" not in server.client.get("/v1/models", headers=asked).headers
    with running(files, tmp_path, cors_origins=("http://app.example",)) as other:
        preflight = other.client.options("/v1/completions", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "http://app.example"
        assert preflight.headers["X-Request-Id"]


def test_a_bug_is_an_internal_error_without_details(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(type(server.context.catalog), "list", fail)
    reply = server.client.get("/v1/adapters")
    monkeypatch.undo()
    assert error_of(reply) == (500, "internal_error", None)
    assert "secret" not in reply.text
    assert reply.headers["X-Request-Id"]


def test_a_client_that_breaks_off_its_body_harms_nobody(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 99"
        connection.sendall(f"{head}\r\n\r\n{{".encode())
    server.wait_until_idle()
    assert server.complete().is_success


def test_the_specification(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/embeddings",
        "/v1/models",
        "/v1/models/{model}",
        "/tokenize",
        "/detokenize",
        "/v1/adapters",
        "/v1/adapters/{name}",
        "/v1/adapters/{name}/activate",
        "/v1/adapters/{name}/revisions/{revision}",
        "/v1/set_adapter",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/admin/tenants",
        "/admin/tenants/{name}",
        "/admin/tenants/{name}/keys",
        "/admin/tenants/{name}/keys/{id}",
        "/admin/audit",
        "/admin/usage",
        "/health",
        "/health/live",
        "/health/ready",
        "/version",
        "/metrics",
    }
    text = server.client.get("/openapi.json").text
    assert '"422"' not in text
    assert "security" not in document
    assert "`best_of` (may be 1)" in document["components"]["schemas"]["CompletionBody"]["description"]


METRICS = {
    "requests_running",
    "requests_waiting",
    "request_success_total",
    "request_errors_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "time_to_first_token_seconds_count",
    "inter_token_latency_seconds_count",
    "e2e_request_latency_seconds_count",
    "request_queue_time_seconds_count",
    "step_duration_seconds_count",
    "batch_rows",
    "batch_distinct_adapters",
    "kv_cache_usage_ratio",
    "preemptions_total",
    "adapters_registered",
    "adapters_resident",
    "adapter_resident_bytes",
    "adapter_slots_used",
    "adapter_slots",
    "adapter_compose_seconds_count",
    "banks",
    "bank_bytes",
}


def test_metrics_tell_of_requests_and_name_nobody(server: Server) -> None:
    before = _metrics(server)
    assert server.complete(model="a0", max_tokens=7).is_success
    assert server.complete(model="nobody").status_code == 404
    server.wait_until_idle()
    after = _metrics(server)
    assert {f"vblora_{name}" for name in METRICS} <= set(after)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["vblora_prompt_tokens_total"] == 4
    assert grown["vblora_generation_tokens_total"] == 7
    assert grown["vblora_request_success_total"] == 1
    assert grown["vblora_request_errors_total"] == 1
    assert grown["vblora_time_to_first_token_seconds_count"] == 1
    assert grown["vblora_inter_token_latency_seconds_count"] == 6
    assert after["vblora_requests_running"] == after["vblora_batch_rows"] == after["vblora_kv_cache_usage_ratio"] == 0
    assert after["vblora_adapters_registered"] == 2
    assert after["process_open_fds"] > 0
    assert after["python_info"] == 1
    text = server.client.get("/metrics").text
    for name in ("a0", "a1", "default", BASE):
        assert f'"{name}' not in text


def _metrics(server: Server) -> dict[str, float]:
    """Sums over labels."""
    sums: dict[str, float] = {}
    for line in server.client.get("/metrics").text.splitlines():
        if not line.startswith("#"):
            name = line.partition("{")[0].partition(" ")[0]
            sums[name] = sums.get(name, 0.0) + float(line.rpartition(" ")[2])
    return sums
