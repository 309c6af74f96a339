from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from serving.adapters.storage.packing import join_bank, pack, unpack_bank, unpack_content
from tests.adapters import adapter_files, small_checkpoint
from vblora.bank import VectorBank
from vblora.checkpoint import BANK_KEY, bank_hash, content_hash, read_adapter_tensors
from vblora.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_taken_apart_comes_together_again(dtype: torch.dtype) -> None:
    config, weights = adapter_files(1)
    tensors = load(weights)
    tensors[BANK_KEY] = tensors[BANK_KEY].to(dtype)
    packed = pack(config, save(tensors))
    same, rest, digest = unpack_content(packed.content)
    bank = unpack_bank(packed.bank, digest)
    assert same == config
    assert BANK_KEY not in rest and rest.keys() | {BANK_KEY} == tensors.keys()
    assert digest == packed.bank_hash == bank_hash(tensors[BANK_KEY])
    assert bank.dtype == dtype and torch.equal(bank, tensors[BANK_KEY])
    whole = read_adapter_tensors(same, {**rest, BANK_KEY: bank})
    assert content_hash(whole) == content_hash(read_adapter_tensors(config, tensors))


def test_adapters_on_one_bank_have_one_and_the_same_bank() -> None:
    first, second, third = (pack(*adapter_files(seed, bank_seed=bank)) for seed, bank in ((1, 0), (2, 0), (3, 1)))
    assert first.bank == second.bank != third.bank
    assert first.content != second.content
    assert first.bank_hash == second.bank_hash != third.bank_hash


def test_a_stored_bank_is_a_file_that_others_read(tmp_path: Path) -> None:
    (tmp_path / "bank").write_bytes(pack(*adapter_files(1)).bank)
    assert torch.equal(VectorBank.load(tmp_path / "bank").vectors, small_checkpoint(1).bank)


def test_weights_without_a_bank_cannot_be_taken_apart() -> None:
    tensors = load(adapter_files(1)[1])
    del tensors[BANK_KEY]
    with pytest.raises(CheckpointError, match="missing"):
        pack(b"{}", save(tensors))


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"rotten",
        adapter_files(1)[1],
        pack(*adapter_files(1)).bank,
        save(
            {"adapter_config.json": torch.zeros(2, dtype=torch.uint8), "bank_hash": torch.zeros(31, dtype=torch.uint8)}
        ),
    ],
)
def test_what_is_no_content_is_seen_to_be_none(wrong: bytes) -> None:
    with pytest.raises(CheckpointError):
        unpack_content(wrong)


def test_what_is_not_the_bank_is_seen_not_to_be() -> None:
    packed = pack(*adapter_files(1))
    spoilt = packed.bank[:-1] + bytes([packed.bank[-1] ^ 1])
    for wrong in (b"", b"rotten", packed.content, pack(*adapter_files(1, bank_seed=1)).bank, spoilt):
        with pytest.raises(CheckpointError):
            unpack_bank(wrong, packed.bank_hash)


def test_a_bank_is_put_where_none_is() -> None:
    whole = adapter_files(1)[1]
    bank = load(whole)[BANK_KEY]
    without = save({name: tensor for name, tensor in load(whole).items() if name != BANK_KEY}, {"format": "pt"})
    joined = join_bank(without, bank)
    assert joined == whole  # as the client would have sent it, to the byte
    with pytest.raises(CheckpointError, match="hold a bank"):
        join_bank(whole, bank)
    with pytest.raises(CheckpointError, match="safetensors"):
        join_bank(b"", bank)
