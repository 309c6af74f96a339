"""Adapter files: round trips, hashes, and a corpus of malformed ones, each of which must be refused by name."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from tests.support import random_adapter, tiny_model
from vblora import CheckpointError, IncompatibleError, VBLoRAConfig, read_adapter, write_adapter
from vblora.checkpoint import (
    BANK_KEY,
    AdapterCheckpoint,
    LogitsModule,
    TopKModule,
    bank_hash,
    content_hash,
    read_adapter_bytes,
    stored_tensors,
)

Tensors = dict[str, Tensor]
A = "base_model.model.layer.vblora_logits_A"
CONFIG: dict[str, Any] = {
    "peft_type": "VBLORA",
    "r": 2,
    "num_vectors": 6,
    "vector_length": 4,
    "topk": 3,
    "target_modules": ["layer"],
}


def full_checkpoint() -> AdapterCheckpoint:
    generator = torch.Generator().manual_seed(0)
    module = LogitsModule(torch.randn(2, 3, 6, generator=generator), torch.randn(5, 2, 6, generator=generator))
    bank = torch.rand(6, 4, generator=generator)
    return AdapterCheckpoint(VBLoRAConfig.from_dict(CONFIG), bank, {"layer": module}, {})


def read(config: dict[str, Any] | bytes, weights: Tensors | bytes) -> AdapterCheckpoint:
    config = config if isinstance(config, bytes) else json.dumps(config).encode()
    return read_adapter_bytes(config, weights if isinstance(weights, bytes) else save(weights))


@pytest.fixture
def full() -> Tensors:
    return stored_tensors(full_checkpoint())


@pytest.fixture
def topk() -> Tensors:
    return stored_tensors(full_checkpoint().topk())


def test_full_round_trip_is_exact(tmp_path: Path) -> None:
    checkpoint = full_checkpoint()
    write_adapter(tmp_path, checkpoint)
    again = read_adapter(tmp_path)
    assert again.trainable
    assert content_hash(again) == content_hash(checkpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_topk_round_trip_is_stable_and_another_content(tmp_path: Path) -> None:
    checkpoint = full_checkpoint()
    write_adapter(tmp_path, checkpoint, topk_only=True)
    again = read_adapter(tmp_path)
    assert not again.trainable
    assert content_hash(again) == content_hash(checkpoint.topk()) != content_hash(checkpoint)
    module, wanted = again.modules["layer"], checkpoint.topk().modules["layer"]
    assert isinstance(module, TopKModule)
    assert isinstance(wanted, TopKModule)
    assert module.a.indices.dtype == torch.uint8
    torch.testing.assert_close(module.b.weights, wanted.b.weights)
    with pytest.raises(CheckpointError, match="no logits"):
        write_adapter(tmp_path, again, topk_only=False)


def test_hashes_tell_contents_apart() -> None:
    checkpoint = full_checkpoint()
    assert content_hash(replace(checkpoint, bank=checkpoint.bank + 1)) != content_hash(checkpoint)
    assert content_hash(replace(checkpoint, config=replace(checkpoint.config, vblora_dropout=0.1))) != content_hash(
        checkpoint
    )
    assert content_hash(replace(checkpoint, config=replace(checkpoint.config, revision="x"))) == content_hash(
        checkpoint
    )
    assert bank_hash(torch.zeros(2, 3)) != bank_hash(torch.zeros(3, 2))
    assert bank_hash(torch.zeros(2, 2)) != bank_hash(torch.zeros(2, 1, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_topk_files_in_half_precision_load_and_sum_to_one(topk: Tensors, dtype: torch.dtype) -> None:
    halved = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in topk.items()}
    module = read({**CONFIG, "save_only_topk_weights": True}, halved).modules["layer"]
    assert isinstance(module, TopKModule)
    torch.testing.assert_close(module.a.weights.sum(-1), torch.ones(2, 3))
    assert (module.a.weights >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_round_past_one_are_clamped(topk: Tensors, dtype: torch.dtype) -> None:
    weights = torch.tensor([0.99999, 0.00003]).expand(2, 3, 2).to(dtype).contiguous()
    read_back = read({**CONFIG, "save_only_topk_weights": True}, {**topk, f"{A}_topk_weights": weights})
    module = read_back.modules["layer"]
    assert isinstance(module, TopKModule)
    assert torch.isfinite(module.a.weights).all()
    torch.testing.assert_close(module.a.weights.sum(-1), torch.ones(2, 3))


def test_biases_and_whole_modules_are_read_as_extras(full: Tensors) -> None:
    extras = {
        "base_model.model.layer.base_layer.bias": torch.ones(20),
        "base_model.model.head.weight": torch.ones(2, 2),
    }
    checkpoint = read({**CONFIG, "bias": "all", "modules_to_save": ["head"]}, {**full, **extras})
    assert set(checkpoint.extras) == {"layer.bias", "head.weight"}
    assert set(stored_tensors(checkpoint)) == {*full, *extras}


def _without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def _with(name: str, tensor: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensor}


def _poked(name: str, value: float) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        tensor = tensors[name].clone()
        tensor.view(-1)[0] = value
        return {**tensors, name: tensor}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without(BANK_KEY), "vblora_vector_bank: is missing"),
        (_without(A.replace("_A", "_B")), "logits_B: is missing"),
        (lambda tensors: {BANK_KEY: tensors[BANK_KEY]}, "adapts no module"),
        (_with("base_model.model.other.weight", torch.ones(2)), "other.weight: is not expected"),
        (_with(f"{A}_topk_indices", torch.ones(2, 3, 3).int()), "not expected"),
        (_with(BANK_KEY, torch.ones(7, 4)), "shape"),
        (_with(A, torch.ones(3, 3, 6)), "shape"),
        (_with(A, torch.ones(2, 18)), "shape"),
        (_with(A, torch.ones(2, 0, 6)), "shape"),
        (_with(A, torch.ones(2, 3, 6).int()), "floating-point"),
        (_with(A, torch.ones(2, 3, 6).double()), "F64"),
        (_poked(A, torch.nan), "NaN or infinity"),
        (_poked(A, torch.inf), "NaN or infinity"),
        (_poked(BANK_KEY, -torch.inf), "NaN or infinity"),
    ],
)
def test_malformed_full_files(full: Tensors, change: Callable[[Tensors], Tensors], message: str) -> None:
    read(CONFIG, full)
    with pytest.raises(CheckpointError, match=message):
        read(CONFIG, change(full))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_poked(f"{A}_topk_indices", 6), r"lies outside \[0, 6\)"),
        (_with(f"{A}_topk_indices", torch.full((2, 3, 3), -1)), "lies outside"),
        (_with(f"{A}_topk_indices", torch.zeros(2, 3, 3).int()), "distinct"),
        (_with(f"{A}_topk_indices", torch.ones(2, 3, 2).int()), "shape"),
        (_with(f"{A}_topk_indices", torch.ones(2, 3, 3)), "integers"),
        (_poked(f"{A}_topk_weights", -0.1), r"outside \[0, 1\]"),
        (_poked(f"{A}_topk_weights", 1.1), r"outside \[0, 1\]"),
        (_with(f"{A}_topk_weights", torch.full((2, 3, 2), 0.6)), "more than 1"),
        (_poked(f"{A}_topk_weights", torch.nan), "NaN"),
        (_with(f"{A}_topk_weights", torch.ones(2, 4, 2) / 9), "shape"),
        (_without(f"{A}_topk_weights"), "missing"),
    ],
)
def test_malformed_topk_files(topk: Tensors, change: Callable[[Tensors], Tensors], message: str) -> None:
    """Seen to fail without the check that the indices of a sub-vector are distinct."""
    config = {**CONFIG, "save_only_topk_weights": True}
    read(config, topk)
    with pytest.raises(CheckpointError, match=message):
        read(config, change(topk))


def test_every_missing_and_every_unexpected_name_is_said_at_once(full: Tensors) -> None:
    kept = {name: tensor for name, tensor in full.items() if "logits_B" not in name and "bank" not in name}
    extra = {f"stray.{number}": torch.ones(1) for number in range(5)}
    missing = ", ".join(sorted(full.keys() - kept.keys()))
    message = f"{missing}: is missing; stray.0, stray.1, stray.2, stray.3, stray.4: is not expected here"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        read(CONFIG, {**kept, **extra})


def test_a_file_of_a_thousand_strangers_gets_a_message_of_bounded_length(full: Tensors) -> None:
    extra = {f"stray.{number:04d}": torch.ones(1) for number in range(1000)}
    with pytest.raises(CheckpointError, match=r"stray\.0199 \(and 800 more\)"):
        read(CONFIG, {**full, **extra})


def _container(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _many(count: int) -> bytes:
    return _container(("{" + ",".join(f'"{number}":{ENTRY}' for number in range(count)) + "}").encode(), b"\0" * 4)


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (b"", "empty or truncated"),
        (b"\x01", "empty or truncated"),
        (struct.pack("<Q", 1 << 40), "header: larger"),
        (_container(b"[1]"), "JSON object"),
        (_container(b"\xff\xfe"), "JSON"),
        (_container(b"[" * 100_000), "JSON"),
        (_container(f'{{"a":{ENTRY},"a":{ENTRY}}}'.encode(), b"\0" * 4), "'a' appears twice"),
        (_container(f'{{"a":{ENTRY}}}'.encode(), b"\0" * 3), "not a sound safetensors"),
        (_container(f'{{"a":{ENTRY}}}'.encode(), b"\0" * 5), "not a sound safetensors"),
        (_container(f'{{"a":{ENTRY},"b":{ENTRY}}}'.encode(), b"\0" * 4), "not a sound safetensors"),
        (_container(b'{"a":{"dtype":"F32","shape":[0,1e99],"data_offsets":[0,0]}}'), "not a sound safetensors"),
        (_container(b'{"a":{"dtype":"F8_E5M2","shape":[1],"data_offsets":[0,1]}}', b"\0"), "F8_E5M2"),
        (_container(b'{"a":7}'), "dtype None"),
        (_container(b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', b"\0" * 4), "not allowed"),
        (_many(30_000), "30000 tensors"),
        (_many(100_000), "header: larger"),
    ],
)
def test_malformed_containers(weights: bytes, message: str) -> None:
    """Seen to fail without the check of repeated names in `parse_json`."""
    with pytest.raises(CheckpointError, match=message):
        read(CONFIG, weights)


def test_zero_by_huge_shapes_are_refused(full: Tensors) -> None:
    entry = f'{{"{A}":{{"dtype":"F32","shape":[2,0,4611686018427387904],"data_offsets":[0,0]}}}}'
    with pytest.raises(CheckpointError):
        read(CONFIG, _container(entry.encode()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "JSON object"),
        (b"\xff", "not valid JSON"),
        (b'{"r": 1, "r": 2}', "'r' appears twice"),
        (b"{}", "peft_type is missing"),
        ({**CONFIG, "r": 0}, "r must be a positive integer"),
        ({**CONFIG, "vblora_dropout": float("nan")}, "vblora_dropout"),
        (b" " * (1 << 20) + b"{}", "larger than"),
    ],
)
def test_malformed_configurations(full: Tensors, config: dict[str, Any] | bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(config, full)


def test_another_peft_type_is_incompatible(full: Tensors) -> None:
    with pytest.raises(IncompatibleError) as caught:
        read({**CONFIG, "peft_type": "LORA"}, full)
    assert caught.value.field == "peft_type"


def test_folders_without_safetensors_are_refused_without_showing_the_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config.json is missing"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is missing$"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="only safetensors") as caught:
        read_adapter(tmp_path)
    assert str(tmp_path) not in str(caught.value)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, full: Tensors) -> None:
    write_adapter(tmp_path, full_checkpoint())
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_config.json").mkdir()
    with pytest.raises(OSError, match="adapter_config"):
        write_adapter(tmp_path, full_checkpoint())
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_random_adapters_of_the_test_kit_are_sound(tmp_path: Path) -> None:
    adapter = random_adapter(tiny_model("gpt2"), targets=["c_attn"], topk=4)
    write_adapter(tmp_path, adapter)
    assert content_hash(read_adapter(tmp_path)) == content_hash(adapter)


@pytest.mark.timeout(20)  # a quadratic search for the repeated key would take a minute
def test_a_key_repeated_among_many_is_found_before_anyone_waits() -> None:
    names = ",".join(f'"{number}": 0' for number in range(60_000))
    with pytest.raises(CheckpointError, match="'59999' appears twice"):
        read_adapter_bytes(f'{{{names}, "59999": 0}}'.encode(), b"")
