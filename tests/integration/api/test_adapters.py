"""Adapters come, change and go over HTTP: uploads, revisions, removal, vLLM's routes, a restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.types import Caller
from tests.integration.api.conftest import BASE, Files, Server, running
from vblora.checkpoint import content_hash, read_adapter

TENANT = Caller("default", frozenset({"tenant"}))


@pytest.fixture
def uploaded(server: Server, files: Files) -> Iterator[str]:
    """`a2` under the name ``mine``, removed afterwards; the revision."""
    reply = server.client.post("/v1/adapters", **files.upload("mine", 2))
    assert reply.status_code == 201
    yield reply.json()["revision"]
    server.client.delete("/v1/adapters/mine")


def test_an_upload_tells_what_it_stored(server: Server, files: Files, uploaded: str) -> None:
    assert uploaded == content_hash(read_adapter(files.adapter(2)))[:16]
    size = sum(len(part) for part in files.upload("mine", 2)["files"].values())
    again = server.client.post("/v1/adapters", **files.upload("mine", 2))
    assert again.status_code == 200
    body = again.json()
    assert body.pop("created") > 0
    assert body == {"name": "mine", "revision": uploaded, "active_revision": uploaded, "bytes": size}


def test_parts_may_come_as_plain_fields_too(server: Server, files: Files) -> None:
    upload = files.upload("mine", 2)
    config = upload["files"].pop("config").decode()
    upload["data"]["config"] = config
    try:
        assert server.client.post("/v1/adapters", **upload).status_code == 201
    finally:
        assert server.client.delete("/v1/adapters/mine").status_code == 204


def test_an_upload_serves_at_once(server: Server, uploaded: str) -> None:
    reply = server.complete(model="mine")
    assert reply.headers["X-VBLoRA-Adapter"] == f"mine@{uploaded}"
    assert reply.json()["choices"][0]["text"] not in {server.text(), server.text(model="a0"), server.text(model="a1")}


def test_listings(server: Server, uploaded: str) -> None:
    listed = server.client.get("/v1/adapters").json()
    assert listed["object"] == "list"
    assert [entry["name"] for entry in listed["data"]] == ["a0", "a1", "mine"]
    assert [entry["shared"] for entry in listed["data"]] == [True, True, False]
    entry = server.client.get("/v1/adapters/mine").json()
    assert entry == listed["data"][2]
    assert entry["active_revision"] == uploaded
    assert entry["is_default"] is False
    (revision,) = entry["revisions"]
    assert revision.pop("created") == entry["created"] > 0
    assert revision == {"revision": uploaded, "bytes": entry["bytes"], "active": True, "resident": True}


@pytest.mark.parametrize(
    ("path", "key", "whole"),
    [("/v1/adapters", "name", ["a0", "a1", "mine"]), ("/v1/models", "id", [BASE, "a0", "a1", "mine"])],
)
def test_lists_come_in_pages(server: Server, uploaded: str, path: str, key: str, whole: list[str]) -> None:
    for limit in range(1, len(whole) + 2):
        seen: list[str] = []
        after: dict[str, str] = {}
        more = True
        while more:
            page = server.client.get(path, params={"limit": limit} | after).json()
            ids = [entry[key] for entry in page["data"]]
            assert (page["object"], page["first_id"], page["last_id"]) == ("list", ids[0], ids[-1])
            assert len(ids) == limit or not page["has_more"]
            seen += ids
            more, after = page["has_more"], {"after": ids[-1]}
        assert seen == whole
    beyond = server.client.get(path, params={"after": "zz"}).json()
    assert beyond == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


@pytest.mark.parametrize("path", ["/v1/adapters", "/v1/models"])
@pytest.mark.parametrize(
    "wrong",
    [{"limit": 0}, {"limit": 1001}, {"limit": -1}, {"limit": "x"}, {"limit": ""}, {"after": "a/b"}, {"after": "\0"}],
)
def test_a_page_that_cannot_be_is_refused(server: Server, path: str, wrong: dict[str, str]) -> None:
    reply = server.client.get(path, params=wrong)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, next(iter(wrong)))


def test_models(server: Server, uploaded: str) -> None:
    models = server.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == [BASE, "a0", "a1", "mine"]
    assert {model["max_model_len"] for model in models} == {256}
    base, *adapters = models
    assert (base["root"], base["parent"]) == (BASE, None)
    assert {adapter["parent"] for adapter in adapters} == {BASE}
    assert adapters[-1]["root"] == f"mine@{uploaded}"
    for alias in ("mine", f"mine@{uploaded}", f"{BASE}:mine"):
        model = server.client.get(f"/v1/models/{alias}").json()
        assert model == {**adapters[-1], "id": alias}
    assert server.client.get(f"/v1/models/{BASE}").json() == base
    for missing in ("nobody", "mine@0000000000000000", "org/name", "base"):
        reply = server.client.get(f"/v1/models/{missing}")
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")


def test_revisions_roll_back_and_forward_and_go(server: Server, files: Files, uploaded: str) -> None:
    first = server.text(model="mine")
    second = server.client.post("/v1/adapters", **files.upload("mine", 3)).json()
    assert second["active_revision"] == second["revision"] != uploaded
    newer = server.text(model="mine")
    assert newer != first
    assert server.text(model=f"mine@{uploaded}") == first
    back = server.post("/v1/adapters/mine/activate", {"revision": uploaded})
    assert (back.status_code, back.json()["active_revision"]) == (200, uploaded)
    assert server.text(model="mine") == first
    forward = server.post("/v1/adapters/mine/activate", {"revision": second["revision"]})
    assert forward.json()["active_revision"] == second["revision"]
    assert server.text(model="mine") == newer
    assert server.client.delete(f"/v1/adapters/mine/revisions/{second['revision']}").status_code == 400
    assert server.client.delete(f"/v1/adapters/mine/revisions/{uploaded}").status_code == 204
    assert server.complete(model=f"mine@{uploaded}").status_code == 404
    assert server.text(model="mine") == newer


def test_what_does_not_exist_is_not_found(server: Server, uploaded: str) -> None:
    unknown = "0" * 16
    replies = [
        server.client.get("/v1/adapters/nobody"),
        server.client.get("/v1/adapters/..%2fetc"),
        server.client.get("/v1/adapters/%00"),
        server.client.delete("/v1/adapters/nobody"),
        server.client.delete(f"/v1/adapters/mine/revisions/{unknown}"),
        server.post("/v1/adapters/mine/activate", {"revision": unknown}),
        server.post("/v1/adapters/mine/activate", {"revision": "../../etc"}),
        server.post("/v1/adapters/nobody/activate", {"revision": uploaded}),
        server.post("/v1/set_adapter", {"adapter": "nobody"}),
        server.post("/v1/set_adapter", {"adapter": f"mine@{unknown}"}),
        server.post("/v1/unload_lora_adapter", {"lora_name": "nobody"}),
    ]
    assert {reply.status_code for reply in replies} == {404}
    codes = [reply.json()["error"]["code"] for reply in replies]
    assert set(codes) <= {"model_not_found", "not_found"}
    assert codes.count("not_found") <= 1  # a slash in a name is another path
    assert server.post("/v1/adapters/mine/activate", {}).json()["error"]["param"] == "revision"
    assert server.post("/v1/set_adapter", {}).json()["error"]["param"] == "adapter"


def test_a_deleted_default_is_missed_until_another_is_set(server: Server, uploaded: str) -> None:
    base = server.text()
    assert server.post("/v1/set_adapter", {"adapter": "mine"}).json() == {"adapter": "mine", "revision": uploaded}
    assert server.text() == server.text(model="mine") != base
    assert server.client.delete("/v1/adapters/mine").status_code == 204
    missed = server.complete()
    assert (missed.status_code, missed.json()["error"]["code"]) == (404, "model_not_found")
    assert missed.json()["error"]["param"] == "model"
    assert server.text(adapter_id="base") == base
    assert server.post("/v1/set_adapter", {"adapter": None}).status_code == 200
    assert server.text() == base


def test_a_tenant_may_not_change_a_shared_adapter(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.tenancy.authenticator.OpenAuthenticator._caller", TENANT)
    revision = server.client.get("/v1/adapters/a0").json()["active_revision"]
    replies = [
        server.client.delete("/v1/adapters/a0"),
        server.post("/v1/adapters/a0/activate", {"revision": revision}),
        server.post("/v1/unload_lora_adapter", {"lora_name": "a0"}),
        server.client.get("/metrics"),
    ]
    assert [reply.status_code for reply in replies] == [403] * 4
    assert {reply.json()["error"]["code"] for reply in replies} == {"permission_denied"}
    assert {reply.json()["error"]["type"] for reply in replies} == {"permission_error"}


def test_vllms_routes_and_words(server: Server, files: Files) -> None:
    body = {"lora_name": "side", "lora_path": str(files.adapter(3))}
    try:
        loaded = server.post("/v1/load_lora_adapter", body)
        assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'side' added successfully.")
        assert loaded.headers["content-type"].startswith("text/plain")
        first = server.text(model="side")
        again = server.post("/v1/load_lora_adapter", body)
        assert (again.status_code, again.json()["error"]["param"]) == (400, "lora_name")
        other = body | {"lora_path": str(files.adapter(4)), "load_inplace": True}
        assert server.post("/v1/load_lora_adapter", other).status_code == 200
        assert server.text(model="side") != first
    finally:
        removed = server.post("/v1/unload_lora_adapter", {"lora_name": "side"})
    assert (removed.status_code, removed.text) == (200, "Success: LoRA adapter 'side' removed successfully.")
    assert server.complete(model="side").status_code == 404


def test_everything_survives_a_restart(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path) as server:
        revision = server.client.post("/v1/adapters", **files.upload("mine", 2)).json()["revision"]
        server.client.post("/v1/adapters", **files.upload("mine", 3))
        server.post("/v1/adapters/mine/activate", {"revision": revision})
        server.post("/v1/load_lora_adapter", {"lora_name": "side", "lora_path": str(files.adapter(4))})
        server.post("/v1/set_adapter", {"adapter": "side"})
        before = server.client.get("/v1/adapters").json()
        texts = [server.text(), server.text(model="mine"), server.text(adapter_id="base")]
    with running(files, tmp_path) as server:
        after = server.client.get("/v1/adapters").json()
        for listing in (before, after):
            for entry in listing["data"]:
                del entry["resident"]
                for stored in entry["revisions"]:
                    del stored["resident"]
        assert after == before
        assert [server.text(), server.text(model="mine"), server.text(adapter_id="base")] == texts
