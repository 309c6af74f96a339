from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serving.settings import ENV_PREFIX, ServerSettings, SettingsError, load_settings

STORAGE_URLS = [
    "",
    "bucket",
    "s3://",
    "s3://key:secret@bucket",
    "s3://bucket/../x",
    "s3://bucket?x",
    "gs://bucket",
    "http://bucket/x",
    "file://host/x",
    "/srv/x",
]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ServerSettings.model_fields:
        monkeypatch.delenv(ENV_PREFIX + name.upper(), raising=False)


def load(config: Path | None = None, **flags: Any) -> ServerSettings:
    return load_settings({"model": "demo", **flags}, config)


def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("max-rank: 2\nport: 2\nmax_queue: 2\n")
    monkeypatch.setenv("VBLORA_MAX_RANK", "3")
    monkeypatch.setenv("VBLORA_PORT", "3")
    settings = load(config, port="4", max_queue=None)
    assert (settings.port, settings.max_rank, settings.max_queue, settings.block_size) == (4, 3, 2, 16)


def test_lists_repeat_as_flags_and_take_commas_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(adapter=["a=/x", "b=/y=z"]).adapters == {"a": Path("/x"), "b": Path("/y=z")}
    monkeypatch.setenv("VBLORA_ADAPTER_ROOT", "/x,/y")
    assert load().adapter_root == (Path("/x"), Path("/y"))


def test_sizes_have_units(tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("max-body-bytes: 1KiB")
    settings = load(config, kv_cache_memory="2GiB")
    assert settings.to_engine_settings().kv_cache_bytes == 2 * 2**30
    assert settings.max_body_bytes == 1024
    assert load(adapter_memory="0").to_engine_settings().adapter_memory_bytes == 0
    assert load(adapter_memory="3MiB").to_engine_settings().adapter_memory_bytes == 3 * 2**20


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"port": "many"}, "--port"),
        ({"port": 65536}, "--port"),
        ({"max_rank": 0}, "--max-rank"),
        ({"adapter_slots": 1}, "--adapter-slots"),
        ({"dtype": "int8"}, "--dtype"),
        ({"drain_timeout": "nan"}, "--drain-timeout"),
        ({"drain_timeout": -1}, "--drain-timeout"),
        ({"kv_cache_memory": "much"}, "--kv-cache-memory"),
        ({"adapter": ["a"]}, "--adapter: write NAME=PATH, not 'a'"),
        ({"adapter": ["=a"]}, "NAME=PATH"),
        ({"model": None}, "model is required"),
        ({"ssl_certfile": "x"}, "ssl-keyfile"),
        ({"jwt_issuer": "x"}, "jwt-jwks"),
        ({"jwt_issuer": "x", "jwt_audience": "y"}, "jwt-jwks"),
        ({"admin_port": -1}, "--admin-port"),
        *(({"storage_url": url}, "--storage-url: write s3://BUCKET") for url in STORAGE_URLS),
    ],
)
def test_what_cannot_be_used_is_named(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load(**flags)


@pytest.mark.parametrize(
    ("url", "folder"),
    [
        (None, None),
        ("s3://bucket", None),
        ("s3://my-bucket.x/some/prefix/", None),
        ("file:///srv/adapters", Path("/srv/adapters")),
        ("file:///srv/all%20of%20them", Path("/srv/all of them")),
    ],
)
def test_where_bytes_are_kept(url: str | None, folder: Path | None) -> None:
    settings = load(storage_url=url)
    assert (settings.storage_url, settings.storage_folder) == (url, folder)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_leave(host: str) -> None:
    assert load(host=host).loopback
    assert not load(host=host).asks_for_keys(tenants=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "example.org", ""])
def test_other_addresses_need_keys_or_leave(host: str) -> None:
    with pytest.raises(SettingsError, match="--allow-unauthenticated"):
        load(host=host).asks_for_keys(tenants=False)
    assert load(host=host).asks_for_keys(tenants=True)
    assert not load(host=host, allow_unauthenticated=True).asks_for_keys(tenants=False)
    assert not load(host=host).loopback


@pytest.mark.parametrize(
    "flags", [{"require_keys": True}, {"jwt_issuer": "x", "jwt_audience": "y", "jwt_jwks": "z"}], ids=["keys", "tokens"]
)
def test_where_keys_are_wanted_an_empty_registry_is_refused(flags: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="vblora-serve tenant add"):
        load(**flags).asks_for_keys(tenants=False)
    assert load(**flags).asks_for_keys(tenants=True)
    assert load(allow_unauthenticated=True).asks_for_keys(tenants=True)


@pytest.mark.parametrize(
    ("text", "words"), [("[1]", "must map"), ("a: [", "cannot be read"), ("colour: red", "no setting colour")]
)
def test_a_faulty_file_is_told(tmp_path: Path, text: str, words: str) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(text)
    with pytest.raises(SettingsError, match=words):
        load(config)
    with pytest.raises(SettingsError, match="cannot be read"):
        load(tmp_path / "nowhere.yaml")


def test_the_keys_of_clients_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VBLORA_API_KEY", "secret")
    assert load().model == "demo"


def test_the_engine_gets_what_was_set() -> None:
    given: dict[str, Any] = {
        "served_model_name": "name",
        "chat_template": "file",
        "dtype": "bfloat16",
        "device": "cuda",
        "max_batch_size": 3,
        "max_model_len": 4,
        "max_batched_tokens": 5,
        "max_queue": 6,
        "max_queue_per_tenant": 7,
        "block_size": 8,
        "max_rank": 9,
        "adapter_slots": 10,
        "adapter_dtype": "float16",
        "quantization": "int8",
    }
    engine = load(**given).to_engine_settings()
    assert {name: getattr(engine, name) for name in given} == given
