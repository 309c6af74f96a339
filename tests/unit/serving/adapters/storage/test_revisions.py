from __future__ import annotations

from pathlib import Path

import pytest

from serving.adapters.storage.local import LocalObjects
from serving.adapters.storage.objects import Objects
from serving.adapters.storage.revisions import RevisionStorage
from tests.adapters import adapter_files, small_checkpoint
from vblora.checkpoint import bank_hash, content_hash, read_adapter_tensors
from vblora.errors import CheckpointError

KEY, OTHER = (content_hash(small_checkpoint(seed)) for seed in (1, 2))
BANK = bank_hash(small_checkpoint(1).bank)


class Noting(LocalObjects):
    """Notes what is put, in order."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.puts: list[str] = []

    def put(self, key: str, data: bytes) -> None:
        self.puts.append(key)
        super().put(key, data)


@pytest.fixture
def objects(tmp_path: Path) -> Noting:
    return Noting(tmp_path)


def test_a_bank_is_stored_once_and_before_what_is_on_it(objects: Noting) -> None:
    storage = RevisionStorage(objects)
    storage.put(KEY, *adapter_files(1))
    storage.put(OTHER, *adapter_files(2))
    assert objects.puts == [f"banks/{BANK}", f"contents/{KEY}", f"banks/{BANK}", f"contents/{OTHER}"]
    assert set(storage.sizes()) == {KEY, OTHER}
    assert set(storage.sizes("banks")) == {BANK}
    for digest in (KEY, OTHER):
        assert content_hash(read_adapter_tensors(*storage.get(digest))) == digest
        assert storage.holds(digest, BANK)


@pytest.mark.parametrize("kind", ["contents", "banks"])
def test_what_is_missing_is_missed_and_can_be_put_again(objects: Noting, kind: str) -> None:
    storage = RevisionStorage(objects)
    storage.put(KEY, *adapter_files(1))
    storage.delete({"contents": KEY, "banks": BANK}[kind], kind)  # type: ignore[arg-type]
    assert not storage.holds(KEY, BANK)
    with pytest.raises(KeyError):
        storage.get(KEY)
    storage.put(KEY, *adapter_files(1))
    assert storage.holds(KEY, BANK)
    assert storage.get(KEY)[0] == adapter_files(1)[0]


@pytest.mark.parametrize("key", [f"contents/{KEY}", f"banks/{BANK}"])
def test_a_truncated_object_is_damaged_until_it_is_put_again(objects: Objects, key: str) -> None:
    storage = RevisionStorage(objects)
    storage.put(KEY, *adapter_files(1))
    objects.put(key, objects.get(key)[:-1])
    with pytest.raises(CheckpointError):
        storage.get(KEY)
    storage.put(KEY, *adapter_files(1))
    assert storage.get(KEY)[0] == adapter_files(1)[0]


def test_only_hashes_become_keys(objects: Objects) -> None:
    storage = RevisionStorage(objects)
    for call in (storage.get, storage.bank, storage.delete, lambda key: storage.put(key, *adapter_files(1))):
        with pytest.raises(ValueError, match="64 lower-case hex digits"):
            call("../" + "a" * 61)
