"""What is refused, with which status, code, param and words; and that requests in flight do not notice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integration.api.conftest import BASE, Files, Server, Stream, upload_of
from tests.support import CONTEXT, save_random_adapter, tiny_model

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def assert_refused(reply: Any, status: int, code: str, param: str | None, words: str) -> None:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert words in error["message"], error
    assert error["type"] == "invalid_request_error"
    assert reply.headers["X-Request-Id"]


FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
    ({"temperature": "1"}, "temperature", "valid number"),
    ({"temperature": True}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
    ({"top_k": -2}, "top_k", "greater than or equal to -1"),
    ({"min_p": -1}, "min_p", "greater than or equal to 0"),
    ({"max_tokens": 0}, "max_tokens", "may only be 0 with echo or prompt_logprobs"),
    ({"max_tokens": 0, "echo": True, "n": 2}, "n", "must be 1"),
    ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
    ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
    ({"max_completion_tokens": -1}, "max_completion_tokens", "greater than or equal to 0"),
    ({"min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
    ({"min_tokens": 13}, "min_tokens", "above max_tokens = 12"),
    ({"seed": 2**63}, "seed", "less than or equal to"),
    ({"presence_penalty": 2.1}, "presence_penalty", "less than or equal to 2"),
    ({"frequency_penalty": -2.1}, "frequency_penalty", "greater than or equal to -2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01"),
    ({"logit_bias": {"70": 101}}, "logit_bias.70", "less than or equal to 100"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"300": 1}}, "logit_bias", "not in [0, 300)"),
    ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias", "at most 1024 entries"),
    ({"stop": ""}, "stop", "empty"),
    ({"stop": ["x"] * 17}, "stop", "at most 16 entries"),
    ({"stop": [1]}, "stop.0", "valid string"),
    ({"stop_token_ids": [300]}, "stop_token_ids", "not in [0, 300)"),
    ({"stop_token_ids": [1] * 1025}, "stop_token_ids", "at most 1024 entries"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream is true"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 17}, "n", "at most 16"),
    ({"logprobs": True}, "logprobs", "valid integer"),
    ({"logprobs": 21}, "logprobs", "at most 20"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "at most 20"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "greater than or equal to 0"),
    ({"echo": "yes"}, "echo", "valid boolean"),
    ({"priority": 2**63}, "priority", "less than or equal to"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "greater than or equal to 1"),
    ({"bad_words": [""]}, "bad_words.0", "at least 1 character"),
    ({"bad_words": ["x"] * 129}, "bad_words", "at most 128 entries"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "at least 1 item"),
    ({"allowed_token_ids": [300]}, "allowed_token_ids", "not in [0, 300)"),
    ({"allowed_token_ids": [1] * 8193}, "allowed_token_ids", "at most 8192 entries"),
    ({"request_id": "a b"}, "request_id", "pattern"),
    ({"request_id": "a\n"}, "request_id", "pattern"),
    ({"request_id": "x" * 129}, "request_id", "pattern"),
    ({"model": None}, "model", "valid string"),
    ({"model": 7}, "model", "valid string"),
    ({"adapter_id": 7}, "adapter_id", "valid string"),
    ({"prompt": ""}, "prompt", "must not be empty"),
    ({"prompt": []}, "prompt", "must not be empty"),
    ({"prompt": ["a", ""]}, "prompt", "must not be empty"),
    ({"prompt": [[]]}, "prompt", "must not be empty"),
    ({"prompt": None}, "prompt", "must be a string"),
    ({"prompt": 5}, "prompt", "must be a string"),
    ({"prompt": ["a", 1]}, "prompt", "either strings only"),
    ({"prompt": [1, True]}, "prompt", "either strings only"),
    ({"prompt": [1.5]}, "prompt", "either strings only"),
    ({"prompt": ["a"] * 257}, "prompt", "at most 256 entries"),
    ({"prompt": [300]}, "prompt", "not in [0, 300)"),
    ({"prompt": [-1]}, "prompt", "not in [0, 300)"),
]


@pytest.mark.parametrize(("fields", "param", "words"), FIELDS, ids=lambda value: str(value)[:40])
def test_a_field_out_of_its_range(server: Server, fields: dict[str, Any], param: str, words: str) -> None:
    assert_refused(server.complete(**fields), 400, "invalid_value", param, words)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1" + "0" * 400])
@pytest.mark.parametrize("field", ["temperature", "top_p", "presence_penalty"])
def test_non_finite_numbers(server: Server, field: str, number: str) -> None:
    raw = f'{{"model": "{BASE}", "prompt": "a", "{field}": {number}}}'
    reply = server.client.post(COMPLETIONS, content=raw, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "invalid_value"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_malformed_bodies(server: Server, raw: bytes, words: str) -> None:
    for path in (COMPLETIONS, CHAT, "/tokenize", "/v1/set_adapter"):
        reply = server.client.post(path, content=raw, headers={"Content-Type": "application/json"})
        assert_refused(reply, 400, "invalid_value", None, words)


def test_a_body_must_say_that_it_is_json(server: Server) -> None:
    reply = server.client.post(COMPLETIONS, content=b"{}", headers={"Content-Type": "text/plain"})
    assert_refused(reply, 400, "invalid_value", None, "Content-Type must be application/json")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (r'{"model": "tiny", "prompt": "\ud800"}', "prompt"),
        (r'{"model": "tiny", "prompt": ["a", "\udfffb"]}', "prompt.1"),
        (r'{"model": "\ud83d", "prompt": "a"}', "model"),
        (r'{"model": "tiny", "prompt": "a", "logit_bias": {"\ud800": 1}}', "logit_bias.?"),
        (r'{"model": "tiny", "prompt": "a", "stop": ["\ude00\ud83d"]}', "stop.0"),
    ],
)
def test_lone_surrogates(server: Server, body: str, param: str) -> None:
    reply = server.client.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
    assert_refused(reply, 400, "invalid_value", param, "lone surrogate")


def test_a_surrogate_pair_is_a_character(server: Server) -> None:
    raw = r'{"model": "tiny", "prompt": "\ud83d\ude00", "max_tokens": 1}'
    assert server.client.post(COMPLETIONS, content=raw, headers={"Content-Type": "application/json"}).is_success


UNSUPPORTED: list[dict[str, Any]] = [
    {"best_of": 2},
    {"suffix": "end"},
    {"guided_json": {}},
    {"tools": [{}]},
    {"tool_choice": "required"},
    {"top_logprobs": 1},
    {"store": True},
    {"store": 0},
]


@pytest.mark.parametrize("fields", UNSUPPORTED, ids=str)
def test_known_fields_that_are_not_supported(server: Server, fields: dict[str, Any]) -> None:
    (name,) = fields
    assert_refused(server.complete(**fields), 400, "invalid_value", name, f"{name} is not supported")


@pytest.mark.parametrize(
    "fields", [{"echo": True}, {"functions": [{}]}, {"chat_template": "x"}, {"add_special_tokens": True}], ids=str
)
def test_chat_fields_that_are_not_supported(server: Server, fields: dict[str, Any]) -> None:
    (name,) = fields
    reply = server.post(CHAT, {"model": BASE, "messages": USER, "max_tokens": 1} | fields)
    assert_refused(reply, 400, "invalid_value", name, f"{name} is not supported")


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        ([], "messages", "at least 1 item"),
        ("hi", "messages", "valid list"),
        ([7], "messages.0", "valid dictionary"),
        ([{"role": "user"}], "messages.0.content", "required"),
        ([{"role": "user", "content": None}], "messages.0.content", "required"),
        ([{"role": "user", "content": 7}], "messages.0.content", "valid string"),
        ([*USER, {"role": "critic", "content": "x"}], "messages.1.role", "'assistant' or 'tool'"),
        ([*USER, {"role": "tool", "content": "x"}], "messages.1.tool_call_id", "needs the tool_call_id"),
        ([{"role": "user", "content": "x", "name": "f"}], "messages.0.tool_call_id", "only a message of role tool"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content", "must be a string or a list of"),
        ([{"role": "user", "content": [7]}], "messages.0.content", "must be a string or a list of"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "messages.0.tool_calls", "only a message of role"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages.0.tool_calls.0.id", "required"),
        (
            [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "[1]"}}]}],
            "messages.0.tool_calls.0.function.arguments",
            "JSON object",
        ),
        ([{"role": "assistant", "content": "x", "audio": {"id": "1"}}], "messages.0.audio", "is not supported"),
    ],
)
def test_messages_that_are_refused(server: Server, messages: Any, param: str, words: str) -> None:
    assert_refused(server.post(CHAT, {"model": BASE, "messages": messages}), 400, "invalid_value", param, words)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [5] * CONTEXT},
        {"prompt": [5] * (CONTEXT - 12 + 1)},
        {"prompt": "fox " * CONTEXT, "max_tokens": None},
        {"max_tokens": CONTEXT},
        {"max_tokens": 10**18},
        {"prompt": [[5], [5] * CONTEXT]},
    ],
    ids=lambda fields: str(fields)[:30],
)
def test_more_than_the_context(server: Server, fields: dict[str, Any]) -> None:
    reply = server.complete(**fields)
    assert_refused(reply, 400, "context_length_exceeded", "prompt", f"context is {CONTEXT} tokens")


def test_the_context_may_be_filled_to_the_last_token(server: Server) -> None:
    assert server.complete(prompt=[5] * (CONTEXT - 12)).is_success
    assert server.complete(prompt=[5] * (CONTEXT - 1), max_tokens=None).json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "nobody"}, "model"),
        ({"model": "a0@0000000000000000"}, "model"),
        ({"model": "a0@"}, "model"),
        ({"model": "@"}, "model"),
        ({"model": ""}, "model"),
        ({"model": "base"}, "model"),
        ({"model": f"{BASE}:"}, "model"),
        ({"model": f"{BASE}:nobody"}, "model"),
        ({"model": "../a0"}, "model"),
        ({"model": "a\0"}, "model"),
        ({"model": "nobody", "adapter_id": "a0"}, "model"),
        ({"model": "nobody", "adapter_id": "base"}, "model"),
        ({"adapter_id": "nobody"}, "adapter_id"),
        ({"adapter_id": f"{BASE}:a0"}, "adapter_id"),
    ],
    ids=str,
)
def test_models_and_adapters_that_do_not_exist(server: Server, fields: dict[str, Any], param: str) -> None:
    assert_refused(server.complete(**fields), 404, "model_not_found", param, "does not exist")
    assert_refused(server.complete(**fields, stream=True), 404, "model_not_found", param, "does not exist")


def test_a_bad_value_is_told_before_an_unknown_model(server: Server) -> None:
    assert_refused(server.complete(model="nobody", prompt=[999]), 400, "invalid_value", "prompt", "not in [0, 300)")


Edit = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]
BANK = "base_model.vblora_vector_bank"


def _tensor(suffix: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Edit:
    """Change the first tensor whose name ends with `suffix`; None removes it."""

    def edit(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(tensors) if name.endswith(suffix))
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed.contiguous()

    return edit


def _config(**entries: Any) -> Edit:
    return lambda config, _: config.update(entries)


def _rename(old: str, new: str) -> Edit:
    def edit(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config["target_modules"] = [
            new.rpartition(".")[2] if name in old else name for name in config["target_modules"]
        ]
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return edit


FAULTS: list[tuple[str, Edit, str]] = [
    ("wrong shape", _tensor("logits_A_topk_indices", lambda t: t[:, 1:]), "shape"),
    ("wrong rank", _config(r=8), "shape"),
    ("missing bank", _tensor(BANK, lambda t: None), "vector_bank"),
    ("missing tensor", _tensor("logits_B_topk_weights", lambda t: None), "logits_B_topk_weights"),
    ("NaN", _tensor(BANK, lambda t: t * float("nan")), "NaN"),
    ("infinite", _tensor("topk_weights", lambda t: t / 0), "infinity"),
    ("index h", _tensor("topk_indices", lambda t: torch.full_like(t, 24)), "ind"),
    ("topk above h", _config(topk=25), "topk"),
]


@pytest.mark.parametrize(("edit", "words"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_adapters_that_fail_a_check(server: Server, files: Files, tmp_path: Path, edit: Edit, words: str) -> None:
    reply = server.client.post("/v1/adapters", **upload_of("bad", _edited(files.adapter(1), tmp_path, edit)))
    assert_refused(reply, 400, "invalid_adapter", None, words)
    assert str(tmp_path) not in reply.text


MISFITS: list[tuple[str, Edit, str]] = [
    ("unknown module", _rename("self_attn.q_proj", "self_attn.made_up"), "target_modules"),
    ("biases", _config(bias="all"), "bias"),
    ("modules_to_save", _config(modules_to_save=["lm_head"]), "modules_to_save"),
    ("another type", _config(peft_type="LORA"), "peft_type"),
]


@pytest.mark.parametrize(("edit", "param"), [misfit[1:] for misfit in MISFITS], ids=[misfit[0] for misfit in MISFITS])
def test_adapters_that_do_not_fit(server: Server, files: Files, tmp_path: Path, edit: Edit, param: str) -> None:
    reply = server.client.post("/v1/adapters", **upload_of("bad", _edited(files.adapter(1), tmp_path, edit)))
    assert_refused(reply, 400, "incompatible_adapter", param, "")


def test_an_adapter_of_too_high_a_rank(server: Server, tmp_path: Path) -> None:
    folder = save_random_adapter(tmp_path / "x", tiny_model(), rank=17)
    reply = server.client.post("/v1/adapters", **upload_of("bad", folder))
    assert_refused(reply, 400, "incompatible_adapter", "r", "16")


def test_an_adapter_of_the_output_layer(server: Server, tmp_path: Path) -> None:
    model = tiny_model(vocab_size=304)
    folder = save_random_adapter(tmp_path / "x", model, targets=("q_proj", "lm_head"))
    reply = server.client.post("/v1/adapters", **upload_of("bad", folder))
    assert_refused(reply, 400, "incompatible_adapter", "target_modules", "lm_head")


def test_an_adapter_for_other_shapes(server: Server, tmp_path: Path) -> None:
    folder = save_random_adapter(tmp_path / "x", tiny_model(hidden_size=32, head_dim=8))
    reply = server.client.post("/v1/adapters", **upload_of("bad", folder))
    assert_refused(reply, 400, "incompatible_adapter", "target_modules", "")


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"\xff"])
def test_config_or_weights_that_are_not_what_they_should_be(server: Server, files: Files, content: bytes) -> None:
    for part in ("config", "weights"):
        upload = files.upload("bad", 1)
        upload["files"][part] = content
        assert_refused(server.client.post("/v1/adapters", **upload), 400, "invalid_adapter", None, "")


def test_an_upload_that_lacks_a_part(server: Server, files: Files) -> None:
    for part in ("config", "weights"):
        upload = files.upload("bad", 1)
        del upload["files"][part]
        assert_refused(server.client.post("/v1/adapters", **upload), 400, "invalid_value", part, "missing")
    upload = files.upload("bad", 1)
    del upload["data"]
    assert_refused(server.client.post("/v1/adapters", **upload), 400, "invalid_value", "name", "missing")
    assert_refused(server.post("/v1/adapters", {}), 400, "invalid_value", None, "multipart/form-data")
    broken = {"Content-Type": "multipart/form-data; boundary=x"}
    assert server.client.post("/v1/adapters", content=b"nonsense", headers=broken).status_code == 400
    unbounded = {"Content-Type": "multipart/form-data"}
    assert server.client.post("/v1/adapters", content=b"nonsense", headers=unbounded).status_code == 400


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "a/b", "a b", "a" * 65, "é", "base", BASE, "a\0", "a@b", "%2e"])
def test_names_that_are_refused(server: Server, files: Files, name: str) -> None:
    assert_refused(server.client.post("/v1/adapters", **files.upload(name, 1)), 400, "invalid_value", "name", "")


def test_weights_as_a_pickle_only(server: Server, files: Files, tmp_path: Path) -> None:
    folder = files.root / "pickled"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((files.adapter(1) / "adapter_config.json").read_bytes())
    torch.save({}, folder / "adapter_model.bin")
    reply = server.post("/v1/load_lora_adapter", {"lora_name": "bad", "lora_path": str(folder)})
    assert_refused(reply, 400, "invalid_adapter", None, "safetensors")
    assert str(folder) not in reply.text


@pytest.mark.parametrize("path", ["/etc", "/", "..", "nowhere", "a\0b", "", "~", "/proc/self/cwd"])
def test_paths_outside_the_adapter_roots(server: Server, path: str) -> None:
    reply = server.post("/v1/load_lora_adapter", {"lora_name": "bad", "lora_path": path})
    assert_refused(reply, 400, "invalid_value", "lora_path", "adapter roots")


@pytest.mark.parametrize(
    "body", [{}, {"prompt": "a", "messages": USER}, {"messages": USER, "add_special_tokens": True}]
)
def test_tokenize_takes_one_kind_of_text(server: Server, body: dict[str, Any]) -> None:
    assert server.post("/tokenize", body).status_code == 400


def test_detokenize_takes_tokens_of_the_vocabulary(server: Server) -> None:
    assert_refused(server.post("/detokenize", {"tokens": [300]}), 400, "invalid_value", "tokens", "not in [0, 300)")
    assert_refused(server.post("/detokenize", {"tokens": ["a"]}), 400, "invalid_value", "tokens.0", "valid integer")
    reply = server.post("/detokenize", {"tokens": [1], "model": "nobody"})
    assert_refused(reply, 404, "model_not_found", "model", "does not exist")


def test_requests_in_flight_do_not_notice(server: Server, files: Files, tmp_path: Path) -> None:
    """Bad requests of every kind, over and over, for as long as a stream of each adapter and of the base runs."""
    models = ["a0", "a1", BASE]
    quiet = [server.text(model=model, max_tokens=240) for model in models]
    misfit = upload_of("bad", _edited(files.adapter(1), tmp_path, _config(modules_to_save=["lm_head"])))
    streams = [Stream(server, model=model, max_tokens=240) for model in models]
    for stream in streams:
        stream.wait_for_text()
    refused = 0
    while all(stream.running for stream in streams):
        for fields, _, _ in FIELDS[:5]:
            refused += server.complete(**fields).status_code == 400
        refused += server.complete(model="nobody").status_code == 404
        refused += server.complete(max_tokens=CONTEXT).status_code == 400
        refused += server.complete(n=2).status_code == 400
        refused += server.client.post("/v1/adapters", **misfit).status_code == 400
        refused += server.client.post("/v1/nowhere").status_code == 404
    assert refused >= 10
    assert [stream.result() for stream in streams] == quiet


def _edited(source: Path, folder: Path, edit: Edit) -> Path:
    config = json.loads((source / "adapter_config.json").read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    edit(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
