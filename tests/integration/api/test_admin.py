"""`/admin`: an operator manages tenants, keys and limits over HTTP, and every change is told by the audit log."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.tenancy.records import QUOTAS
from tests.integration.api.conftest import Files, Server, running
from tests.integration.api.keyed import Keyed, keyed


@pytest.fixture(scope="module")
def house(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    """A server with keys: of the operator `ops` and of the tenant `acme`."""
    with keyed(files, tmp_path_factory.mktemp("data")) as started:
        yield started


@pytest.fixture
def ops(house: Keyed) -> Iterator[httpx.Client]:
    with house.client("ops") as client:
        yield client


def error_of(reply: httpx.Response) -> tuple[int, str, str | None]:
    error = reply.json()["error"]
    return reply.status_code, error["code"], error["param"]


def create(ops: httpx.Client, name: str, **fields: Any) -> dict[str, Any]:
    reply = ops.post("/admin/tenants", json={"name": name, **fields})
    assert reply.status_code == 201, reply.text
    assert reply.headers["Cache-Control"] == "no-store"
    entry: dict[str, Any] = reply.json()
    return entry


def status_with(house: Keyed, key: str, path: str = "/v1/models") -> int:
    return httpx.get(house.server.url + path, headers={"Authorization": f"Bearer {key}"}).status_code


def test_a_tenant_is_made_used_disabled_and_deleted(house: Keyed, ops: httpx.Client) -> None:
    made = create(ops, "zoe", weight=2, quotas={"max_tokens": 5, "adapters": None})
    key = made.pop("key")
    assert re.fullmatch(r"vbk_[A-Za-z0-9_-]{43}", key["key"])
    assert (made["name"], made["role"], made["disabled"], made["weight"]) == ("zoe", "tenant", False, 2)
    assert made["quotas"] == dict.fromkeys(QUOTAS) | {"max_tokens": 5}
    assert ops.get("/admin/tenants/zoe").json() == made
    assert status_with(house, key["key"]) == 200
    assert status_with(house, key["key"], "/admin/tenants") == 403
    disabled = ops.patch("/admin/tenants/zoe", json={"disabled": True})
    assert disabled.json() == made | {"disabled": True}
    assert status_with(house, key["key"]) == 401
    assert ops.patch("/admin/tenants/zoe", json={"disabled": False}).json() == made
    assert status_with(house, key["key"]) == 200
    assert ops.delete("/admin/tenants/zoe").status_code == 204
    assert status_with(house, key["key"]) == 401
    assert error_of(ops.get("/admin/tenants/zoe")) == (404, "not_found", None)


def test_keys_are_made_listed_and_revoked(house: Keyed, ops: httpx.Client) -> None:
    first = create(ops, "zoe")["key"]
    reply = ops.post("/admin/tenants/zoe/keys")
    second = reply.json()
    assert (reply.status_code, reply.headers["Cache-Control"]) == (201, "no-store")
    assert status_with(house, first["key"]) == status_with(house, second["key"]) == 200
    listed = ops.get("/admin/tenants/zoe/keys").json()["data"]
    assert {entry["id"] for entry in listed} == {first["id"], second["id"]}
    assert all("key" not in entry and entry["revoked"] is None for entry in listed)
    assert ops.delete(f"/admin/tenants/zoe/keys/{first['id']}").status_code == 204
    assert status_with(house, first["key"]) == 401
    assert status_with(house, second["key"]) == 200
    assert error_of(ops.delete(f"/admin/tenants/zoe/keys/{first['id']}")) == (404, "not_found", None)
    assert error_of(ops.delete(f"/admin/tenants/acme/keys/{second['id']}")) == (404, "not_found", None)
    ops.delete("/admin/tenants/zoe")


def test_limits_change_and_reach_those_who_enforce_them(ops: httpx.Client) -> None:
    create(ops, "zoe", quotas={"adapters": 3})
    changed = ops.patch("/admin/tenants/zoe", json={"weight": 0.5, "quotas": {"max_tokens": 0, "adapters": None}})
    assert changed.json()["quotas"] == dict.fromkeys(QUOTAS) | {"max_tokens": 0}
    assert changed.json()["weight"] == 0.5
    assert ops.patch("/admin/tenants/zoe", json={}).json() == changed.json()
    ops.delete("/admin/tenants/zoe")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "default"}, "name"),
        ({"name": "acme"}, "name"),
        ({"name": "x", "role": "king"}, "role"),
        ({"name": "x", "weight": 0}, "weight"),
        ({"name": "x", "weight": 1001}, "weight"),
        ({"name": "x", "weight": True}, "weight"),
        ({"name": "x", "quotas": {"max_tokens": -1}}, "quotas.max_tokens"),
        ({"name": "x", "quotas": {"max_tokens": 1.5}}, "quotas.max_tokens"),
        ({"name": "x", "quotas": {"max_tokens": True}}, "quotas.max_tokens"),
        ({"name": "x", "quotas": {"max_tokens": 2**63}}, "quotas.max_tokens"),
        ({"name": "x", "quotas": {"max_token": 1}}, "quotas.max_token"),
        ({"name": "x", "disabled": True}, "disabled"),
    ],
)
def test_faults_are_named_and_change_nothing(ops: httpx.Client, body: dict[str, Any], param: str) -> None:
    assert error_of(ops.post("/admin/tenants", json=body)) == (400, "invalid_value", param)
    if param.startswith(("quotas", "weight")):
        change = {name: value for name, value in body.items() if name != "name"}
        assert error_of(ops.patch("/admin/tenants/acme", json=change)) == (400, "invalid_value", param)
    assert [entry["name"] for entry in ops.get("/admin/tenants").json()["data"]] == ["acme", "ops"]


def test_the_last_operator_stays(house: Keyed, ops: httpx.Client) -> None:
    assert error_of(ops.delete("/admin/tenants/ops"))[:2] == (400, "invalid_value")
    assert error_of(ops.patch("/admin/tenants/ops", json={"disabled": True}))[:2] == (400, "invalid_value")
    assert ops.get("/admin/tenants/ops").json()["disabled"] is False
    assert status_with(house, house.keys["ops"]) == 200


def test_lists_are_paged(ops: httpx.Client) -> None:
    for number in range(3):
        create(ops, f"t{number}")
    page = ops.get("/admin/tenants", params={"limit": 3}).json()
    assert [entry["name"] for entry in page.pop("data")] == ["acme", "ops", "t0"]
    assert page == {"object": "list", "has_more": True, "first_id": "acme", "last_id": "t0"}
    page = ops.get("/admin/tenants", params={"limit": 3, "after": "t0"}).json()
    assert [entry["name"] for entry in page["data"]] == ["t1", "t2"]
    assert page["has_more"] is False
    page = ops.get("/admin/tenants", params={"after": "t2"}).json()
    assert page == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}
    for path, query, param in [
        ("/admin/tenants", {"limit": 0}, "limit"),
        ("/admin/tenants", {"limit": 1001}, "limit"),
        ("/admin/audit", {"limit": "many"}, "limit"),
        ("/admin/audit", {"after": "x"}, "after"),
        ("/admin/tenants/acme/keys", {"limit": -1}, "limit"),
    ]:
        assert error_of(ops.get(path, params=query)) == (400, "invalid_value", param)
    for number in range(3):
        ops.delete(f"/admin/tenants/t{number}")


def test_every_change_is_told_with_who_and_from_where(ops: httpx.Client) -> None:
    before = ops.get("/admin/audit", params={"limit": 1}).json()["last_id"]
    key = create(ops, "zoe")["key"]["id"]
    ops.patch("/admin/tenants/zoe", json={"weight": 2})
    ops.delete(f"/admin/tenants/zoe/keys/{key}")
    ops.delete("/admin/tenants/zoe")
    page = ops.get("/admin/audit", params={"limit": 6}).json()
    told = page["data"]
    assert [(row["action"], row["subject"]) for row in reversed(told)] == [
        ("tenant.add", "tenant"),
        ("key.add", key),
        ("tenant.change", "weight=2.0"),
        ("key.revoke", key),
        ("tenant.change", "disabled=True"),
        ("tenant.delete", "zoe"),
    ]
    assert {(row["actor"], row["address"], row["tenant"]) for row in told} == {("ops", "127.0.0.1", "zoe")}
    older = ops.get("/admin/audit", params={"limit": 1, "after": page["last_id"]}).json()["data"]
    assert [str(row["id"]) for row in older] == [before]


def test_a_tenants_adapters_go_with_it(house: Keyed, ops: httpx.Client, files: Files) -> None:
    key = create(ops, "zoe")["key"]["key"]
    with httpx.Client(base_url=house.server.url, headers={"Authorization": f"Bearer {key}"}) as zoe:
        assert zoe.post("/v1/adapters", **files.upload("mine", 1)).status_code == 201
        assert zoe.post("/v1/set_adapter", json={"adapter": "mine"}).status_code == 200
    ops.delete("/admin/tenants/zoe")
    key = create(ops, "zoe")["key"]["key"]
    with httpx.Client(base_url=house.server.url, headers={"Authorization": f"Bearer {key}"}) as zoe:
        assert zoe.get("/v1/adapters").json()["data"] == []
        reply = zoe.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1})
        assert reply.headers["X-VBLoRA-Adapter"] == "base"
    ops.delete("/admin/tenants/zoe")


def test_a_server_without_keys_goes_on_without_them(files: Files, tmp_path: Path) -> None:
    """Tenants made on it are for its next start."""
    with running(files, tmp_path) as server:
        reply = server.client.post("/admin/tenants", json={"name": "ops", "role": "operator"})
        key = {"Authorization": f"Bearer {reply.json()['key']['key']}"}
        assert server.client.get("/v1/models").status_code == 200
        assert _actors(server) == {"default"}
    with running(files, tmp_path, require_keys=True) as server:
        assert server.client.get("/v1/models").status_code == 401
        assert server.client.get("/admin/tenants", headers=key).status_code == 200


def _actors(server: Server) -> set[str]:
    return {row["actor"] for row in server.client.get("/admin/audit").json()["data"]}
