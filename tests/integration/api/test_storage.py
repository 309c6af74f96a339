"""Stored bytes over HTTP: what is lost or rotten, banks that uploads only name, and a bucket in place of the disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load, save

from serving.app import create_app
from serving.errors import StartupError
from serving.settings import ServerSettings, SettingsError
from tests.integration.api.conftest import Files, running
from tests.integration.api.keyed import Keyed, keyed
from tests.s3 import new_bucket
from vblora.checkpoint import BANK_KEY, bank_hash

UNKNOWN = "sha256:" + "0" * 64
KINDS = ("contents", "banks")


def error_of(reply: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = reply.json()["error"]
    return {"status": reply.status_code, **error}


def only_named(files: Files, name: str, number: int) -> dict[str, Any]:
    """The upload of an adapter whose bank is only named."""
    upload = files.upload(name, number)
    tensors = load(upload["files"]["weights"])
    bank = tensors.pop(BANK_KEY)
    upload["files"]["weights"] = save(tensors, {"format": "pt"})
    upload["data"]["bank"] = f"sha256:{bank_hash(bank)}"
    return upload


# --- damage -----------------------------------------------------------------------------------------------------


def stored(data: Path, kind: str) -> set[Path]:
    return set(data.glob(f"adapters/*/revisions/{kind}/*"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_lost_or_rotten_bytes_are_the_trouble_of_one_adapter(
    files: Files, tmp_path: Path, kind: str, damage: str
) -> None:
    with running(files, tmp_path) as server:
        server.client.post("/v1/adapters", **files.upload("well", 2)).raise_for_status()
        before = stored(tmp_path, kind)
        server.client.post("/v1/adapters", **files.upload("ill", 3)).raise_for_status()
        well, ill = server.text(model="well"), server.text(model="ill")
        (path,) = stored(tmp_path, kind) - before
    data = bytearray(path.read_bytes())
    data[-2] ^= 4
    path.unlink() if damage == "missing" else path.write_bytes(data)
    with running(files, tmp_path) as server:
        for fields in ({"model": "ill"}, {"adapter_id": "ill"}, {"model": "ill", "stream": True}):
            error = error_of(server.complete(**fields))
            assert (error["status"], error["type"], error["code"]) == (400, "invalid_request_error", "invalid_adapter")
            assert f"are {damage}: upload the adapter again" in error["message"]
            assert str(tmp_path) not in error["message"] and path.name not in error["message"]
        assert server.text(model="well") == well
        assert [entry["name"] for entry in server.client.get("/v1/adapters").json()["data"]] == ["ill", "well"]
        assert server.client.post("/v1/adapters", **files.upload("ill", 3)).status_code == 200
        assert server.text(model="ill") == ill
    with running(files, tmp_path) as server:
        assert server.text(model="ill") == ill


# --- banks that are only named ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def house(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    """A server with the tenants `acme` and `beta`, and `a0` for both."""
    with keyed(files, tmp_path_factory.mktemp("data"), adapter=(f"a0={files.adapter(0)}",)) as started:
        with started.client("ops") as ops:
            made = ops.post("/admin/tenants", json={"name": "beta"}).json()
        yield Keyed(started.server, {**started.keys, "beta": made["key"]["key"]})


@pytest.fixture
def acme(house: Keyed) -> Iterator[httpx.Client]:
    with house.client("acme") as client:
        yield client
        for entry in client.get("/v1/adapters").json()["data"]:
            if not entry["shared"]:
                client.delete(f"/v1/adapters/{entry['name']}")


@pytest.fixture
def beta(house: Keyed) -> Iterator[httpx.Client]:
    """Has an adapter on a bank that nobody else is on."""
    with house.client("beta") as client:
        yield client
        client.delete("/v1/adapters/secret")


def test_metadata_alone_is_enough_where_the_bank_is_ones_own(acme: httpx.Client, files: Files) -> None:
    whole = acme.post("/v1/adapters", **files.upload("x", 2)).json()
    named = acme.post("/v1/adapters", **only_named(files, "y", 2))
    assert named.status_code == 201
    assert named.json() | {"name": "x", "created": 0} == whole | {"created": 0}  # full bytes among them
    body = {"prompt": "the fox", "max_tokens": 8, "temperature": 0}
    texts = [acme.post("/v1/completions", json={"model": name, **body}).json()["choices"] for name in ("x", "y")]
    assert texts[0] == texts[1]


def test_a_shared_adapters_bank_may_be_named(acme: httpx.Client, files: Files) -> None:
    assert acme.post("/v1/adapters", **only_named(files, "x", 0)).status_code == 201


def test_another_tenants_bank_is_unknown(acme: httpx.Client, beta: httpx.Client, files: Files) -> None:
    upload = only_named(files, "x", 3)
    unheard = error_of(acme.post("/v1/adapters", **upload))
    beta.post("/v1/adapters", **files.upload("secret", 3)).raise_for_status()
    foreign = error_of(acme.post("/v1/adapters", **upload))
    unknown = error_of(acme.post("/v1/adapters", **upload | {"data": {"name": "x", "bank": UNKNOWN}}))
    assert foreign == unknown == unheard
    assert (foreign["status"], foreign["code"], foreign["param"]) == (400, "invalid_adapter", "bank")
    assert beta.post("/v1/adapters", **upload | {"data": {**upload["data"], "name": "secret"}}).status_code == 200


@pytest.mark.parametrize("bank", ["", "0" * 64, "sha256:abc", UNKNOWN.upper(), "\0"])
def test_what_is_no_hash_is_refused(acme: httpx.Client, files: Files, bank: str) -> None:
    upload = only_named(files, "x", 0)
    error = error_of(acme.post("/v1/adapters", **upload | {"data": {"name": "x", "bank": bank}}))
    assert (error["status"], error["code"], error["param"]) == (400, "invalid_value", "bank")


def test_a_bank_that_is_named_and_brought_is_refused(acme: httpx.Client, files: Files) -> None:
    upload = files.upload("x", 0)
    error = error_of(acme.post("/v1/adapters", **upload | {"data": only_named(files, "x", 0)["data"]}))
    assert (error["status"], error["code"], error["param"]) == (400, "invalid_adapter", "bank")


def test_a_quota_counts_the_bank_that_is_only_named(files: Files, tmp_path: Path) -> None:
    whole = sum(len(part) for part in files.upload("x", 2)["files"].values())
    with running(files, tmp_path, max_adapter_bytes=2 * whole - 1) as server:
        assert server.client.post("/v1/adapters", **files.upload("x", 2)).status_code == 201
        assert error_of(server.client.post("/v1/adapters", **only_named(files, "y", 2)))["status"] == 429


# --- buckets ----------------------------------------------------------------------------------------------------


def test_a_bucket_keeps_adapters_over_a_restart(files: Files, tmp_path: Path, s3_server: None) -> None:
    bucket = new_bucket()
    with running(files, tmp_path, storage_url=bucket.url) as server:
        server.client.post("/v1/adapters", **files.upload("x", 2)).raise_for_status()
        server.client.post("/v1/adapters", **only_named(files, "y", 2)).raise_for_status()
        text = server.text(model="x")
        assert sorted(key.partition("/")[0] for key in bucket.held()) == ["banks", "contents"]
    assert list(tmp_path.rglob("contents")) == []
    with running(files, tmp_path, storage_url=bucket.url) as server:
        assert server.text(model="x") == text
        server.client.delete("/v1/adapters/x")
        server.client.delete("/v1/adapters/y")
        assert bucket.held() == set()


def test_a_storage_that_does_not_answer_is_unavailable(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_server: None
) -> None:
    import obstore
    from obstore.exceptions import GenericError

    def fail(*_: Any, **__: Any) -> Any:
        raise GenericError("the endpoint http://10.0.0.1 is gone")

    with running(files, tmp_path, storage_url=(bucket := new_bucket()).url) as server:
        server.client.post("/v1/adapters", **files.upload("x", 2)).raise_for_status()
    with running(files, tmp_path, storage_url=bucket.url) as server:
        with monkeypatch.context() as broken:
            broken.setattr(obstore, "get", fail)
            broken.setattr(obstore, "put", fail)
            for reply in (server.complete(model="x"), server.client.post("/v1/adapters", **files.upload("y", 3))):
                error = error_of(reply)
                assert (error["status"], error["code"]) == (503, "storage_unavailable")
                assert "10.0.0.1" not in error["message"]
                assert "Retry-After" in reply.headers
        assert server.complete(model="x").status_code == 200
        assert [entry["name"] for entry in server.client.get("/v1/adapters").json()["data"]] == ["x"]


def test_a_folder_may_be_named_by_its_address(files: Files, tmp_path: Path) -> None:
    folder = tmp_path / "else where"
    with running(files, tmp_path / "data", storage_url=folder.as_uri()) as server:
        server.client.post("/v1/adapters", **files.upload("x", 2)).raise_for_status()
        assert len(list(folder.glob("contents/*"))) == len(list(folder.glob("banks/*"))) == 1


def test_a_bucket_needs_the_extra(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "serving.adapters.storage.s3", None)
    settings = ServerSettings(
        model=str(files.model), data_dir=tmp_path, storage_url="s3://bucket", kv_cache_memory="16MiB"
    )
    with pytest.raises(SettingsError, match=r"needs the extra `s3`: pip install 'vblora\[s3\]'"):
        create_app(settings)


def test_a_bucket_that_is_not_there_stops_the_start(files: Files, tmp_path: Path, s3_server: None) -> None:
    settings = ServerSettings(
        model=str(files.model), data_dir=tmp_path, storage_url="s3://nobodys", kv_cache_memory="16MiB"
    )
    with pytest.raises(StartupError, match="the adapters under --storage-url cannot be used"):
        create_app(settings)
