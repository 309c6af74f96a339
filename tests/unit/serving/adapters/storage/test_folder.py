"""A storage in a folder, and data that an earlier version left there."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from serving.adapters.storage.folder import open_folder
from tests.adapters import adapter_files, small_checkpoint, write_files
from tests.failpoints import fails_at, snapshots
from vblora.checkpoint import BANK_KEY, bank_hash, content_hash, read_adapter_tensors

HASHES = {content_hash(small_checkpoint(seed)): seed for seed in (1, 2)}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """What an earlier version left."""
    for digest, seed in HASHES.items():
        write_files(tmp_path / "old" / digest, adapter_files(seed))
    (tmp_path / "old" / ".partial-x").mkdir()
    return tmp_path / "old"


def serves(root: Path) -> None:
    """Both contents can be read, on one bank, and nothing is left of the old order."""
    storage = open_folder(root)
    for digest in HASHES:
        assert content_hash(read_adapter_tensors(*storage.get(digest))) == digest
    assert set(storage.sizes()) == set(HASHES)
    assert set(storage.sizes("banks")) == {bank_hash(small_checkpoint(1).bank)}
    assert {path.name for path in root.iterdir()} == {"contents", "banks"}


def test_an_old_folder_goes_on_serving(old: Path) -> None:
    serves(old)
    serves(old)


def test_a_kill_while_it_is_converted_loses_nothing(old: Path, tmp_path: Path) -> None:
    taken = snapshots(old, tmp_path / "taken", lambda: open_folder(old))
    assert len(taken) > 20
    for snapshot in taken:
        serves(snapshot)


def test_a_failure_while_it_is_converted_loses_nothing(old: Path, tmp_path: Path) -> None:
    failures, failed = 0, True
    while failed:
        root = Path(shutil.copytree(old, tmp_path / f"run{failures}"))
        failed = fails_at(failures, partial(open_folder, root))
        serves(root)
        failures += 1
    assert failures > 10


def test_damaged_old_files_stay_and_harm_no_other(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = write_files(old / ("e" * 64), (b"{}", b"rotten"))
    write_files(old / ("d" * 64), (b"{}", b""))
    (old / ("d" * 64) / "adapter_model.safetensors").unlink()
    storage = open_folder(old)
    assert set(storage.sizes()) == set(HASHES)
    assert damaged.exists()
    assert "e" * 64 in caplog.text
    assert torch.equal(storage.get(next(iter(HASHES)))[1][BANK_KEY], small_checkpoint(1).bank)
