from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from serving.adapters.files import remove_partial, write_file
from serving.adapters.storage import LocalStorage
from tests.failpoints import fails_at, snapshots

KEY, OTHER = "a" * 64, "b" * 64


def test_what_is_put_is_got_back(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "deep" / "adapters")
    storage.put(KEY, b"config", b"weights")
    storage.put(OTHER, b"", b"w")
    assert storage.get(KEY) == (b"config", b"weights")
    assert {key: stored.bytes for key, stored in storage.sizes().items()} == {KEY: 13, OTHER: 1}


def test_a_stored_content_stays_as_it_is(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put(KEY, b"config", b"weights")
    storage.put(KEY, b"other", b"bytes")
    assert storage.get(KEY) == (b"config", b"weights")


def test_a_content_that_is_put_again_counts_as_new(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    assert storage.modified(KEY) is None
    storage.put(KEY, b"config", b"weights")
    assert time.time() - 60 < (storage.modified(KEY) or 0) <= time.time()
    os.utime(tmp_path / KEY, (1000, 1000))
    assert storage.modified(KEY) == storage.sizes()[KEY].modified == 1000
    storage.put(KEY, b"config", b"weights")
    assert time.time() - 60 < storage.sizes()[KEY].modified <= time.time()


def test_what_is_deleted_is_gone(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put(KEY, b"config", b"weights")
    storage.delete(KEY)
    storage.delete(KEY)
    with pytest.raises(KeyError):
        storage.get(KEY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["", "../" + "a" * 61, "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n", "a" * 63 + "\0"])
def test_only_hashes_become_paths(tmp_path: Path, key: str) -> None:
    storage = LocalStorage(tmp_path)
    for call in (storage.get, storage.delete, lambda key: storage.put(key, b"", b"")):
        with pytest.raises(ValueError, match="64 lower-case hex digits"):
            call(key)


def test_a_start_removes_what_interrupted_writes_left_and_nothing_else(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put(KEY, b"config", b"weights")
    (tmp_path / ".partial-x").mkdir()
    (tmp_path / ".partial-x" / "adapter_config.json").write_bytes(b"half")
    (tmp_path / ".partial-y").write_bytes(b"half")
    (tmp_path / "notes.txt").write_bytes(b"the operator's")
    assert list(LocalStorage(tmp_path).sizes()) == [KEY]
    assert {path.name for path in tmp_path.iterdir()} == {KEY, "notes.txt"}


def test_a_stale_link_is_removed_but_not_followed(tmp_path: Path) -> None:
    kept, root = tmp_path / "kept", tmp_path / "root"
    kept.mkdir()
    (kept / "file").write_bytes(b"")
    root.mkdir()
    (root / ".partial-link").symlink_to(kept)
    remove_partial(root)
    assert list(root.iterdir()) == []
    assert (kept / "file").exists()


def test_threads_may_put_and_delete_the_same_content(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)

    def work(number: int) -> None:
        for _ in range(8):
            storage.put(KEY, b"config", b"weights")
            if number % 2:
                storage.delete(KEY)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    storage.put(KEY, b"config", b"weights")
    assert storage.get(KEY) == (b"config", b"weights")
    assert [path.name for path in tmp_path.iterdir()] == [KEY]


def put(root: Path) -> None:
    LocalStorage(root).put(OTHER, b"config", b"weights")


def delete(root: Path) -> None:
    LocalStorage(root).delete(KEY)


def rewrite(root: Path) -> None:
    write_file(root / "state", b"new")


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    root = tmp_path / "prepared"
    LocalStorage(root).put(KEY, b"c", b"w")
    write_file(root / "state", b"old")
    return root


def content(root: Path) -> dict[str, bytes]:
    remove_partial(root)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", [put, delete, rewrite])
def test_a_kill_at_any_moment_leaves_old_or_new(prepared: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    old = content(prepared)
    taken = snapshots(prepared, tmp_path / "taken", lambda: change(prepared))
    new = content(prepared)
    found = [content(snapshot) for snapshot in taken]
    assert old != new
    assert old in found and new in found
    assert all(state in (old, new) for state in found)


@pytest.mark.parametrize("change", [put, delete, rewrite])
def test_a_failure_at_any_write_leaves_old_or_new(
    prepared: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    old = content(prepared)
    failures = 0
    while True:
        root = Path(shutil.copytree(prepared, tmp_path / f"run{failures}"))
        failed = fails_at(failures, partial(change, root))
        leftovers = [path for path in root.rglob(".partial-*") if path.is_file()]
        state = content(root)
        change(root)
        assert leftovers == []
        assert state in (old, content(root))
        if not failed:
            break
        failures += 1
    assert failures >= 3


def test_the_operating_system_is_asked_to_keep_files_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    LocalStorage(tmp_path / "root").put(KEY, b"config", b"weights")
    assert synced[:2] == ["adapter_config.json", "adapter_model.safetensors"]
    assert synced[2].startswith(".partial-")
    assert synced[3:] == ["root"]
