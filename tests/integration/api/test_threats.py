"""SECURITY.md's rows that need a whole server; docs/security.md says which test stands for which row.

Each docstring names what was taken away to see the test fail.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from benchmarks.bench_registry import register_many
from serving.api.context import Caps
from serving.app import create_app
from serving.errors import StartupError
from serving.settings import ServerSettings
from serving.store.database import open_database, sqlite_url
from tests.integration.api.conftest import BASE, Files, Server, Stream, running
from tests.integration.api.keyed import Keyed, keyed
from tests.integration.api.test_traffic import _slow_down

PROMPT = [*range(5, 45)]
CHAT = {"messages": [{"role": "user", "content": "the fox"}]}


@pytest.fixture(scope="module")
def house(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    """A server with keys, small caps, and the tenants `acme`, `zoe` and `ops`."""
    shared = (f"a0={files.adapter(0)}",)
    with keyed(files, tmp_path_factory.mktemp("data"), adapter=shared, **SMALL) as started:
        with started.client("ops") as ops:
            started.keys["zoe"] = ops.post("/admin/tenants", json={"name": "zoe"}).json()["key"]["key"]
        yield started


def completion(house: Keyed, tenant: str, **body: Any) -> dict[str, Any]:
    with house.client(tenant) as client:
        reply = client.post("/v1/completions", json={"model": BASE, "max_tokens": 4, "temperature": 0, **body})
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


# --- the prefix cache -----------------------------------------------------------------------------------------------


def test_a_cached_prompt_is_met_by_no_other_tenant_adapter_or_revision(house: Keyed, files: Files) -> None:
    """Seen to fail without the tenant, and without the revision, in `BlockKeys._root`."""

    def cached(tenant: str, **fields: Any) -> int:
        usage = completion(house, tenant, prompt=PROMPT, **fields)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert [cached("acme") for _ in range(2)] == [0, 32], (
        "the same tenant finds its own, or nothing here shows anything"
    )
    assert [cached("zoe") for _ in range(2)] == [0, 32]
    assert [cached("zoe", cache_salt=salt) for salt in ("acme", "zoe", "null")] == [0, 0, 0], "a salt only narrows"
    assert [cached("acme", model="a0") for _ in range(2)] == [0, 32]
    assert cached("zoe", model="a0") == 0, "a shared adapter shares no cache"
    with house.client("acme") as acme:
        acme.post("/v1/adapters", **files.upload("mine", 2))
        old = [completion(house, "acme", model="mine", prompt=PROMPT) for _ in range(2)]
        acme.post("/v1/adapters", **files.upload("mine", 3))
        new = completion(house, "acme", model="mine", prompt=PROMPT)
        acme.delete("/v1/adapters/mine")
    assert old[0]["choices"] == old[1]["choices"] != new["choices"]
    assert [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (*old, new)] == [0, 32, 0]


# --- what comes with an adapter -------------------------------------------------------------------------------------


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.path), "w")


def test_nothing_that_comes_with_an_adapter_is_run(server: Server, files: Files, tmp_path: Path) -> None:
    """Pickles, code, `auto_map` and chat templates. Seen to fail with `torch.load` of the .bin in `read_folder`."""
    canary, folder = tmp_path / "canary", files.root / "hostile"
    code = f"open({str(canary)!r}, 'w')\n"
    config = json.loads((files.adapter(2) / "adapter_config.json").read_text())
    hostile = {
        **config,
        "auto_mapping": {"base_model_class": "Model", "parent_library": "modeling_hostile"},
        "auto_map": {"AutoModel": "modeling_hostile.Model"},
        "base_model_name_or_path": str(folder),
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(hostile))
    (folder / "modeling_hostile.py").write_text(code)
    (folder / "__init__.py").write_text(code)
    template = "{{ 'x' * 30 }}"
    (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin", "vblora_bank.pt"):
        torch.save(Canary(canary), folder / name)
    body = {"lora_name": "hostile", "lora_path": str(folder)}
    refused = server.post("/v1/load_lora_adapter", body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_adapter")
    assert str(files.root) not in refused.text
    assert not canary.exists()
    (folder / "adapter_model.safetensors").write_bytes((files.adapter(2) / "adapter_model.safetensors").read_bytes())
    try:
        assert server.post("/v1/load_lora_adapter", body).status_code == 200
        assert server.complete(model="hostile").status_code == 200
        tokens = [server.post("/tokenize", {"model": model, **CHAT}).json() for model in ("hostile", BASE)]
        assert tokens[0] == tokens[1]
        reply = server.post("/v1/chat/completions", {"model": BASE, **CHAT, "chat_template": template, "max_tokens": 1})
        assert reply.status_code in (200, 400)
        if reply.status_code == 200:
            assert reply.json()["usage"]["prompt_tokens"] == tokens[1]["count"], "a template of a request is not used"
    finally:
        server.post("/v1/unload_lora_adapter", {"lora_name": "hostile"})
    assert not canary.exists()


# --- paths and addresses --------------------------------------------------------------------------------------------

PATHS = ["/etc/passwd", "..", "../../etc", "a\0b", "%2e%2e", "..%2f..", "~root", "file:///etc/passwd", "//etc"]


def test_an_adapter_outside_the_roots_is_out_of_reach(server: Server, files: Files, tmp_path: Path) -> None:
    """By its path, by a way back, and by a link within. Seen to fail without `_contained` in `resolve_folder`."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (outside / name).write_bytes((files.adapter(2) / name).read_bytes())
    link = files.root / "link"
    link.symlink_to(outside)
    back = files.root / "a0" / Path(*[".."] * 20) / outside.relative_to("/")
    assert back.resolve() == outside
    for path in (outside, back, link):
        reply = server.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": str(path)})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "lora_path")
        assert str(outside) not in reply.text
    link.unlink()


@pytest.mark.parametrize("path", PATHS)
def test_no_name_or_path_leads_out(server: Server, files: Files, path: str) -> None:
    """Names, paths and parts of addresses. Seen to fail without the grammar in `Catalog._check_name`."""
    loaded = server.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": path})
    inside = server.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": f"{files.root}/a0/../../{path}"})
    named = server.client.post("/v1/adapters", **files.upload(path, 2))
    unloaded = server.post("/v1/unload_lora_adapter", {"lora_name": path})
    asked = server.complete(model=path)
    quoted = httpx.URL(server.url).copy_with(raw_path=b"/v1/adapters/" + _percent(path))
    got = [server.client.get(quoted), server.client.delete(quoted)]
    replies = [loaded, inside, named, unloaded, asked, *got]
    assert {reply.status_code for reply in replies} <= {400, 404}, replies
    for reply in replies:
        assert str(files.root) not in reply.text
        assert str(files.model) not in reply.text
        assert "root:" not in reply.text


def _percent(text: str) -> bytes:
    return "".join(f"%{byte:02x}" for byte in text.encode()).encode()


def test_no_address_is_ever_asked_for_an_adapter(server: Server, files: Files, tmp_path: Path) -> None:
    """There is nothing to redirect: adapters come from requests and from the operator's folders. What is fetched at all
    is an operator's JWKS, whose redirects tests/unit/serving/tenancy/test_tokens.py refuses. Seen to fail with
    `urllib.request.urlopen(path)` at the start of `resolve_folder`."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.setblocking(False)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        for scheme in ("http", "https", "s3", "hf", "ftp"):
            url = f"{scheme}://{address}/a0"
            reply = server.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": url})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "lora_path")
            assert server.complete(model=url).status_code == 404
            assert server.complete(adapter_id=url).status_code == 404
        upload = files.upload("far", 2)
        config = json.loads(upload["files"]["config"]) | {"base_model_name_or_path": f"http://{address}/base"}
        upload["files"]["config"] = json.dumps(config).encode()
        assert server.client.post("/v1/adapters", **upload).status_code == 201
        assert server.complete(model="far").status_code == 200
        assert server.client.delete("/v1/adapters/far").status_code == 204
        settings = {"model": str(files.model), "data_dir": tmp_path, "kv_cache_memory": 1 << 26}
        with pytest.raises(StartupError, match="adapter x from http"):
            create_app(ServerSettings(**settings, adapter=(f"x=http://{address}/a0",)))
        with pytest.raises(BlockingIOError):
            listener.accept()


# --- caps -----------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "max_body_bytes": 20_000,
    "max_upload_bytes": 2_000_000,
    "max_prompts": 2,
    "max_choices": 2,
    "max_stop": 2,
    "max_stop_token_ids": 2,
    "max_allowed_token_ids": 2,
    "max_bad_words": 2,
    "max_logit_bias": 2,
    "max_logprobs": 2,
    "max_tools": 1,
    "max_structure_bytes": 64,
    "max_structure_choices": 2,
}
COMPLETIONS, CHATS, UPLOADS = "/v1/completions", "/v1/chat/completions", "/v1/adapters"
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in "ab"]
NESTED = "(" * 30 + "a" + "){9}" * 30
OVER: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "body_bytes": [(COMPLETIONS, {"prompt": "a" * 20_001})],
    "upload_bytes": [(UPLOADS, {})],
    "prompts": [(COMPLETIONS, {"prompt": ["a"] * 3}), ("/v1/embeddings", {"input": ["a"] * 3})],
    "choices": [(COMPLETIONS, {"prompt": "a", "n": 3}), (CHATS, {**CHAT, "n": 3})],
    "stop": [(COMPLETIONS, {"prompt": "a", "stop": ["x"] * 3})],
    "stop_token_ids": [(COMPLETIONS, {"prompt": "a", "stop_token_ids": [5, 6, 7]})],
    "allowed_token_ids": [(COMPLETIONS, {"prompt": "a", "allowed_token_ids": [5, 6, 7]})],
    "bad_words": [(COMPLETIONS, {"prompt": "a", "bad_words": ["x", "y", "z"]})],
    "logit_bias": [(COMPLETIONS, {"prompt": "a", "logit_bias": {"5": 1, "6": 1, "7": 1}})],
    "logprobs": [
        (COMPLETIONS, {"prompt": "a", "logprobs": 3}),
        (COMPLETIONS, {"prompt": "a", "prompt_logprobs": 3}),
        (CHATS, {**CHAT, "logprobs": True, "top_logprobs": 3}),
    ],
    "tools": [(CHATS, {**CHAT, "tools": TOOLS})],
    "structure_bytes": [(COMPLETIONS, {"prompt": "a", "structured_outputs": {"regex": "a" * 65}})],
    "structure_choices": [(COMPLETIONS, {"prompt": "a", "structured_outputs": {"choice": ["x", "y", "z"]}})],
}


def test_what_is_over_a_cap_reaches_no_engine_and_disturbs_no_stream(
    house: Keyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail without the check of lists, of prompts, of numbers, of bodies and of structures, each alone."""
    assert set(OVER) == {field.name for field in fields(Caps) if field.name != "compiling"}, "each cap has its request"
    key = house.keys["zoe"]
    quiet = Stream(house.server, key).result()
    speed_up = _slow_down(house.server)
    stream = Stream(house.server, key)
    stream.wait_for_text()
    submitted: list[Any] = []
    monkeypatch.setattr(type(house.server.context.engine), "submit", lambda _, request: submitted.append(request))
    with house.client("acme") as acme:
        for cap, requests in OVER.items():
            for path, body in requests:
                if path == UPLOADS:
                    reply = acme.post(path, data={"name": "x"}, files={"config": b"{}", "weights": b"0" * 2_000_001})
                else:
                    reply = acme.post(path, json={"model": BASE, **body})
                assert reply.status_code == (413 if "bytes" in cap and "structure" not in cap else 400), (
                    cap,
                    reply.text,
                )
        for number in ("NaN", "Infinity", "1e999"):
            content = f'{{"model": "{BASE}", "prompt": "a", "temperature": {number}}}'
            assert (
                acme.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"}).status_code == 400
            )
    assert submitted == []
    assert stream.running, "the stream ended before the last refusal: it shows nothing"
    speed_up()
    assert stream.result() == quiet


# --- what is told ---------------------------------------------------------------------------------------------------


def test_a_thousand_adapters_add_no_series_to_the_metrics(files: Files, tmp_path: Path) -> None:
    """Seen to fail with a label that is another for each request, and with a gauge for each revision."""
    with running(files, tmp_path, adapter=(f"a0={files.adapter(0)}",), metrics_compat="vllm") as server:
        assert server.complete(model="a0").is_success
        assert server.complete(model="nobody-has-this").status_code == 404

        def series() -> set[str]:
            lines = server.client.get("/metrics").text.splitlines()
            names = (line.rpartition(" ")[0] for line in lines if not line.startswith("#"))
            return {name for name in names if not name.startswith(("vblora_http", "vllm:lora"))}

        before = series()
        database = open_database(sqlite_url(tmp_path / "registry.db"))
        register_many(database, BASE, tenants=0, each=0, shared=1000)
        database.dispose()
        assert len(server.client.get("/v1/adapters").json()["data"]) == 1000
        for number in range(0, 1000, 50):
            assert server.complete(model=f"shared{number}", max_tokens=1).is_success
            assert server.complete(model=f"unknown{number}").status_code == 404
        assert series() == before
        text = server.client.get("/metrics").text
        assert "vblora_adapters_registered 1001.0" in text
        assert text.count("\nvllm:lora_requests_info{") == 1
        assert not [name for name in ("shared", "unknown", "nobody-has-this", "a0") if name in text]


def test_no_prompt_and_no_answer_is_logged(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answered, refused, unknown, and failed in a step. Seen to fail with a log line of the body in `json_body`."""
    caplog.set_level(logging.DEBUG)
    secret = "zanzibar qwertzuiop"
    answer = server.text(prompt=secret, max_tokens=40)
    server.post("/v1/chat/completions", {"model": BASE, "messages": [{"role": "user", "content": secret}], "n": 99})
    server.post("/v1/chat/completions", {"model": "a0", "messages": [{"role": secret, "content": secret}]})
    server.complete(prompt=secret, model="nobody")
    server.complete(prompt=secret, max_tokens=100_000)
    server.client.post("/v1/completions", content=secret, headers={"Content-Type": "application/json"})
    server.post("/tokenize", {"prompt": secret})

    def fail(*_: Any) -> None:
        raise RuntimeError("a step fails")

    with monkeypatch.context() as patch:
        patch.setattr(server.context.engine.runner, "run", fail)  # type: ignore[attr-defined]
        assert server.complete(prompt=secret).status_code == 500
    assert server.text(prompt=secret, max_tokens=40) == answer
    logged = "\n".join(f"{record.getMessage()} {vars(record)} {record.exc_text}" for record in caplog.records)
    assert "a step fails" in logged and "/v1/completions" in logged
    assert "zanzibar" not in logged and "qwertzuiop" not in logged
    assert answer not in logged


# --- promises -------------------------------------------------------------------------------------------------------


def test_fifty_bad_loads_harm_nobody(server: Server, files: Files) -> None:
    """25 adapters that are missing and 25 that are invalid, beside streams of each adapter and of the base. Seen to
    fail where a file that fails a check is an error of the server's."""
    models = ["a0", "a1", BASE]
    quiet = [server.text(model=model, max_tokens=200) for model in models]
    speed_up = _slow_down(server)
    streams = [Stream(server, model=model) for model in models]
    for stream in streams:
        stream.wait_for_text()
    weights = (files.adapter(2) / "adapter_model.safetensors").read_bytes()
    for number in range(25):
        path = str(files.root / f"missing{number}")
        assert server.post("/v1/load_lora_adapter", {"lora_name": "bad", "lora_path": path}).status_code == 400
        upload = files.upload("bad", 2)
        upload["files"]["weights"] = weights[: number * len(weights) // 25]
        reply = server.client.post("/v1/adapters", **upload)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_adapter")
        assert server.complete(model="bad").status_code == 404
    assert all(stream.running for stream in streams), "the streams ended before the last load: they show nothing"
    good = server.client.post("/v1/adapters", **files.upload("good", 2))
    assert good.status_code == 201
    assert server.complete(model="good", max_tokens=1).status_code == 200
    speed_up()
    assert [stream.result() for stream in streams] == quiet
    assert server.client.delete("/v1/adapters/good").status_code == 204
    assert server.context.engine.residency.stats().adapters == 2  # type: ignore[attr-defined]


def test_eight_requests_share_a_cache_for_three(files: Files, tmp_path: Path) -> None:
    """All finish, with the tokens of a run that has room. Seen to fail where `Scheduler._make_room` preempts nobody."""
    texts: list[list[str]] = []
    blocks = 2 * 2 * 2 * 16 * 4 * 16  # bytes of one: keys and values, layers, heads, their size, float32, tokens
    for place, memory in enumerate((1 << 26, 3 * 16 * blocks)):
        with running(
            files, tmp_path / str(place), kv_cache_memory=memory, adapter=(f"a0={files.adapter(0)}",)
        ) as server:
            speed_up = _slow_down(server)
            models = [("a0", BASE)[number % 2] for number in range(8)]
            streams = [Stream(server, model=model, prompt=f"{n} fox", max_tokens=180) for n, model in enumerate(models)]
            streams[0].wait_for_text()
            speed_up()
            texts.append([stream.result() for stream in streams])
            assert (server.context.engine.stats().preemptions > 0) == bool(place)
    assert texts[0] == texts[1]
