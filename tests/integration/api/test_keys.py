"""A server with keys: default deny on every route, one refusal, roles, and changes that hold within a second."""

from __future__ import annotations

import json
import logging
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from typer.testing import CliRunner

from serving.api.application import ROUTERS
from serving.cli import app as command_line
from serving.settings import SettingsError
from tests.integration.api.conftest import BASE, Files, running
from tests.integration.api.keyed import Keyed, add_tenants, keyed

PUBLIC = {"/health", "/health/live", "/health/ready", "/version"}
OPERATORS = {"/metrics", "/openapi.json", "/docs", "/docs/{asset}", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
CLAIMED_BYTES = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def house(files: Files, folder: Path) -> Iterator[Keyed]:
    with keyed(files, folder, adapter=(f"a0={files.adapter(0)}",)) as started:
        yield started


def routes() -> list[tuple[str, str]]:
    """Method and path of every route of the application, and of some that are none."""
    listed = [(method, route.path) for router in ROUTERS for route in router.routes for method in route.methods]  # type: ignore[attr-defined]
    others = [("GET", "/openapi.json"), ("GET", "/nowhere"), ("POST", "/"), ("PUT", "/v1/models"), ("GET", "/docs/x/y")]
    return sorted({*listed, *others})


def raw(house: Keyed, method: str, path: str, *headers: str) -> tuple[int, str]:
    """Status and answer to a request whose body is announced and never sent."""
    port = int(house.server.url.rpartition(":")[2])
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", f"Content-Length: {CLAIMED_BYTES}"]
    with closing(socket.create_connection(("127.0.0.1", port), timeout=5)) as connection:
        connection.sendall("\r\n".join([*lines, "Content-Type: application/json", *headers, "", ""]).encode())
        answer = b""
        while b"\r\n\r\n" not in answer or not _whole(answer):
            part = connection.recv(65536)
            assert part, answer
            answer += part
    return int(answer.split()[1]), answer.decode()


def _whole(answer: bytes) -> bool:
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    return length is None or len(body) >= int(length[1])


def test_the_walk_meets_every_route() -> None:
    paths = {path for _, path in routes()}
    assert len(routes()) > 35
    assert paths >= PUBLIC | OPERATORS
    assert {"/admin/tenants", "/admin/tenants/{name}/keys/{id}", "/admin/audit"} <= paths


@pytest.mark.parametrize(("method", "path"), routes())
def test_no_route_but_the_public_ones_answers_without_a_key(house: Keyed, method: str, path: str) -> None:
    """SECURITY.md, "forgotten route without a key". Fails for a route that `required_role` lets pass, and, by a
    timeout, where the body is read first."""
    concrete = re.sub(r"\{[^}]+\}", "x", path)
    if path in PUBLIC:
        with house.client(None) as client:
            assert client.request(method, concrete).status_code == 200
        return
    for headers in [(), ("Authorization: Bearer vbk_" + "A" * 43,), ("X-API-Key: x", "Authorization: Basic x")]:
        status, answer = raw(house, method, concrete, *headers)
        assert status == 401, answer
        assert "www-authenticate: bearer" in answer.lower()
        assert method == "HEAD" or json.loads(answer.partition("\r\n\r\n")[2])["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(("method", "path"), routes())
def test_operators_routes_are_theirs_alone(house: Keyed, method: str, path: str) -> None:
    concrete = re.sub(r"\{[^}]+\}", "x", path)
    theirs = path in OPERATORS or path.startswith(("/admin", "/docs"))
    with house.client("acme") as client:
        assert (client.request(method, concrete).status_code == 403) == theirs
    if theirs:
        assert raw(house, method, concrete, f"Authorization: Bearer {house.keys['acme']}")[0] == 403
        with house.client("ops") as client:
            assert client.request(method, concrete).status_code not in {401, 403}


def test_spellings_of_a_path_open_nothing(house: Keyed) -> None:
    for path in ("//health/../metrics", "/health/../metrics", "/%6detrics", "/health%2f..%2fmetrics", "/METRICS"):
        status, _ = raw(house, "GET", path)
        assert status == 401, path
    status, _ = raw(house, "GET", "http://127.0.0.1/metrics")
    assert status == 401
    for header in ("X-Forwarded-Prefix: /health", "X-Original-URL: /health", "X-HTTP-Method-Override: GET"):
        assert raw(house, "GET", "/metrics", header)[0] == 401


def test_one_refusal_for_missing_wrong_revoked_and_disabled(house: Keyed) -> None:
    with house.client("ops") as ops:
        gone = ops.post("/admin/tenants", json={"name": "gone"}).json()["key"]["key"]
        ops.patch("/admin/tenants/gone", json={"disabled": True})
        issued = ops.post("/admin/tenants/acme/keys").json()
        ops.delete(f"/admin/tenants/acme/keys/{issued['id']}")
        replies = [
            httpx.get(f"{house.server.url}/v1/models", headers=headers)
            for headers in (
                {},
                {"Authorization": "Bearer nonsense"},
                {"Authorization": house.keys["acme"]},
                {"Authorization": f"Bearer {gone}"},
                {"Authorization": f"Bearer {issued['key']}"},
            )
        ]
        assert {(reply.status_code, reply.text) for reply in replies} == {(401, replies[0].text)}
        ops.delete("/admin/tenants/gone")


def test_each_tenant_has_adapters_of_its_own(house: Keyed, files: Files) -> None:
    with house.client("acme") as acme, house.client("ops") as ops:
        assert acme.post("/v1/adapters", **files.upload("mine", 1)).status_code == 201
        assert [entry["name"] for entry in acme.get("/v1/adapters").json()["data"]] == ["a0", "mine"]
        assert [entry["name"] for entry in ops.get("/v1/adapters").json()["data"]] == ["a0"]
        assert acme.delete("/v1/adapters/a0").status_code == 403
        body = {"model": BASE, "adapter_id": "mine", "prompt": "a", "max_tokens": 1}
        assert acme.post("/v1/completions", json=body).status_code == 200
        assert ops.post("/v1/completions", json=body).status_code == 404
        assert acme.delete("/v1/adapters/mine").status_code == 204


def within_a_second(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 1.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_command_line_beside_it_is_heard_within_a_second(house: Keyed, folder: Path) -> None:
    """The promise of SECURITY.md's row "keys": revocable. Fails with `Recent` of more than a second."""

    def tenant(*arguments: str) -> str:
        result = CliRunner().invoke(command_line, ["tenant", *arguments, "--data-dir", str(folder)])
        assert result.exit_code == 0, result.stderr
        return result.stdout.strip()

    def status(key: str) -> int:
        return httpx.get(f"{house.server.url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

    old = tenant("add", "zoe")
    assert status(old) == 200  # never asked before: at once
    tenant("disable", "zoe")
    within_a_second(lambda: status(old) == 401)
    tenant("enable", "zoe")
    within_a_second(lambda: status(old) == 200)
    new = tenant("rotate-key", "zoe")
    within_a_second(lambda: status(old) == 401)
    assert status(new) == 200
    with house.client("ops") as ops:
        ops.delete("/admin/tenants/zoe")


def test_what_an_operator_uploads_is_for_all_to_use_and_for_operators_to_change(house: Keyed, files: Files) -> None:
    with house.client("ops") as ops, house.client("acme") as acme:
        assert ops.post("/v1/adapters", **files.upload("offer", 2)).status_code == 201
        assert acme.get("/v1/adapters/offer").json()["shared"] is True
        answer = acme.post("/v1/completions", json={"model": "offer", "prompt": "the fox", "max_tokens": 2})
        assert answer.status_code == 200
        assert acme.delete("/v1/adapters/offer").status_code == 403
        assert acme.post("/v1/adapters", **files.upload("offer", 3)).status_code == 201, "a tenant's own name wins"
        assert acme.get("/v1/adapters/offer").json()["shared"] is False
        assert acme.delete("/v1/adapters/offer").status_code == 204
        assert ops.delete("/v1/adapters/offer").status_code == 204
        assert acme.get("/v1/adapters/offer").status_code == 404


def test_keys_are_neither_logged_nor_stored(
    files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """SECURITY.md, "keys": grep logs and database. Fails when a key is written anywhere below the data folder."""
    caplog.set_level(logging.DEBUG)
    with keyed(files, tmp_path) as house:
        with house.client("ops") as ops:
            made = ops.post("/admin/tenants", json={"name": "zoe"}).json()["key"]["key"]
            more = ops.post("/admin/tenants/zoe/keys").json()["key"]
            ops.post("/v1/completions", json={"model": "nobody", "prompt": "a"})
            ops.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
        secrets = [*house.keys.values(), made, more, "vbk_" + "B" * 43]
        for secret in secrets:
            for header in (f"Bearer {secret}", secret, f"Basic {secret}"):
                httpx.get(f"{house.server.url}/v1/models", headers={"Authorization": header})
    stored = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "registry.db" for path in stored)
    output = "".join(capfd.readouterr())
    logged = "\n".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records)
    assert "/v1/completions" in logged
    for secret in secrets:
        tail = secret[8:]  # the registry keeps what is before, to tell keys apart
        assert tail not in logged and tail not in output
        assert not [path for path in stored if tail.encode() in path.read_bytes()]


def test_last_use_is_told(files: Files, tmp_path: Path) -> None:
    with keyed(files, tmp_path) as house, house.client("acme") as acme, house.client("ops") as ops:
        assert ops.get("/admin/tenants/acme/keys").json()["data"][0]["last_used"] is None
        acme.get("/v1/models")
        deadline = time.monotonic() + 10
        while ops.get("/admin/tenants/acme/keys").json()["data"][0]["last_used"] is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_with_keys_any_host_is_answered_and_any_address_allowed(files: Files, tmp_path: Path) -> None:
    with keyed(files, tmp_path, host="0.0.0.0") as house, house.client("acme") as acme:
        assert acme.get("/v1/models", headers={"Host": "models.example.org"}).status_code == 200


def test_the_specification_asks_for_keys(house: Keyed) -> None:
    with house.client("ops") as ops:
        document = ops.get("/openapi.json").json()
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        assert all(("security" in entry) == (path not in PUBLIC) for entry in methods.values()), path


def test_the_admin_port_serves_metrics_and_health_and_nothing_else(files: Files, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with keyed(files, tmp_path, admin_port=port) as house, httpx.Client(base_url=f"http://127.0.0.1:{port}") as admin:
        assert "vblora_requests_running" in admin.get("/metrics").text
        assert [admin.get(path).status_code for path in sorted(PUBLIC)] == [200] * 4
        for method, path in routes():
            if path not in {*PUBLIC, "/metrics"}:
                reply = admin.request(method, re.sub(r"\{[^}]+\}", "x", path))
                assert reply.status_code == 404, path
        assert admin.get("/metrics", headers={"Host": "example.org"}).status_code == 400
        for forwarded in ("127.0.0.1", "::1"):  # where a request comes from decides nothing
            headers = {"X-Forwarded-For": forwarded, "Forwarded": f"for={forwarded}"}
            assert httpx.get(f"{house.server.url}/metrics", headers=headers).status_code == 401
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/metrics")


def test_an_empty_registry_is_refused_where_keys_are_required(files: Files, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--require-keys"), running(files, tmp_path, require_keys=True):
        pass
    add_tenants(tmp_path)
    with running(files, tmp_path, require_keys=True) as server:
        assert server.client.get("/v1/models").status_code == 401


def test_a_disabled_tenant_alone_still_makes_a_server_ask(files: Files, tmp_path: Path) -> None:
    command = ["--data-dir", str(tmp_path)]
    assert CliRunner().invoke(command_line, ["tenant", "add", "acme", *command]).exit_code == 0
    assert CliRunner().invoke(command_line, ["tenant", "disable", "acme", *command]).exit_code == 0
    with running(files, tmp_path) as server:
        assert server.client.get("/v1/models").status_code == 401


def test_tokens_of_an_identity_provider(files: Files, tmp_path: Path) -> None:
    private = ed25519.Ed25519PrivateKey.generate()
    public = jwt.get_algorithm_by_name("EdDSA").to_jwk(private.public_key(), as_dict=True)
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [{**public, "kid": "1"}]}))
    options = {
        "jwt_issuer": "https://id.example",
        "jwt_audience": "vblora",
        "jwt_jwks": str(tmp_path / "jwks.json"),
        "jwt_tenant_claim": "tenant",
    }

    def header(tenant: str, seconds: float = 60) -> dict[str, str]:
        claims = {"iss": "https://id.example", "aud": "vblora", "tenant": tenant, "exp": time.time() + seconds}
        return {"Authorization": "Bearer " + jwt.encode(claims, private, "EdDSA", headers={"kid": "1"})}

    with keyed(files, tmp_path / "data", **options) as house, httpx.Client(base_url=house.server.url) as client:
        assert client.get("/v1/models", headers=header("acme")).status_code == 200
        assert client.get("/metrics", headers=header("acme")).status_code == 403
        assert client.get("/metrics", headers=header("ops")).status_code == 200
        refused = [
            client.get("/v1/models"),
            client.get("/v1/models", headers=header("nobody")),
            client.get("/v1/models", headers=header("acme", -60)),
        ]
        assert {(reply.status_code, reply.text) for reply in refused} == {(401, refused[0].text)}
        with house.client("acme") as acme:
            assert acme.get("/v1/models").status_code == 200
