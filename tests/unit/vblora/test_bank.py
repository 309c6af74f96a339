"""The vector bank: files, hashes, initialisation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support import save_random_adapter, tiny_model
from vblora import CheckpointError, ConfigError, VectorBank, read_adapter


def test_saved_bank_loads_with_the_same_hash(tmp_path: Path) -> None:
    bank = VectorBank.random(6, 4, 0.5)
    assert (bank.vectors.abs() <= 0.5).all()
    assert bank.vectors.requires_grad
    bank.save(tmp_path / "bank.safetensors")
    loaded = VectorBank.load(tmp_path / "bank.safetensors")
    assert torch.equal(loaded.vectors, bank.vectors)
    assert loaded.hash == bank.hash != VectorBank.random(6, 4, 0.5).hash


def test_bank_of_an_adapter_folder(tmp_path: Path) -> None:
    folder = save_random_adapter(tmp_path / "a", tiny_model())
    assert torch.equal(VectorBank.load(folder).vectors, read_adapter(folder).bank)


def test_files_without_a_sound_bank_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="missing"):
        VectorBank.load(file)
    for tensors in (
        {"other": torch.ones(2, 2)},
        {"base_model.vblora_vector_bank": torch.ones(2)},
        {"base_model.vblora_vector_bank": torch.full((2, 2), torch.nan)},
    ):
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match="vblora_vector_bank"):
            VectorBank.load(file)
    with pytest.raises(ConfigError, match="shape"):
        VectorBank(torch.ones(3))
