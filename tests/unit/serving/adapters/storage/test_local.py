from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from serving.adapters.files import remove_partial, write_file
from serving.adapters.storage.local import LocalObjects
from tests.failpoints import fails_at, snapshots

KEY, OTHER = "contents/" + "a" * 64, "contents/" + "b" * 64


def test_a_start_removes_what_interrupted_writes_left_and_nothing_else(tmp_path: Path) -> None:
    LocalObjects(tmp_path).put(KEY, b"content")
    for folder in (tmp_path, tmp_path / "contents", tmp_path / "banks"):
        (folder / ".partial-x").mkdir()
        (folder / ".partial-x" / "file").write_bytes(b"half")
        (folder / ".partial-y").write_bytes(b"half")
        (folder / "notes.txt").write_bytes(b"the operator's")
    assert list(LocalObjects(tmp_path).list("contents")) == ["a" * 64]
    assert list(tmp_path.rglob(".partial-*")) == []
    assert len(list(tmp_path.rglob("notes.txt"))) == 3


def test_a_stale_link_is_removed_but_not_followed(tmp_path: Path) -> None:
    kept, root = tmp_path / "kept", tmp_path / "root"
    kept.mkdir()
    (kept / "file").write_bytes(b"")
    root.mkdir()
    (root / ".partial-link").symlink_to(kept)
    remove_partial(root)
    assert list(root.iterdir()) == []
    assert (kept / "file").exists()


def test_a_folder_in_an_objects_place_is_what_the_medium_refuses(tmp_path: Path) -> None:
    (tmp_path / KEY).mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        LocalObjects(tmp_path).get(KEY)


def put(root: Path) -> None:
    LocalObjects(root).put(OTHER, b"content")


def replace(root: Path) -> None:
    LocalObjects(root).put(KEY, b"new")


def delete(root: Path) -> None:
    LocalObjects(root).delete(KEY)


def rewrite(root: Path) -> None:
    write_file(root / "state", b"new")


CHANGES = [put, replace, delete, rewrite]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    root = tmp_path / "prepared"
    LocalObjects(root).put(KEY, b"c")
    write_file(root / "state", b"old")
    return root


def content(root: Path) -> dict[str, bytes]:
    LocalObjects(root)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", CHANGES)
def test_a_kill_at_any_moment_leaves_old_or_new(prepared: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    old = content(prepared)
    taken = snapshots(prepared, tmp_path / "taken", lambda: change(prepared))
    new = content(prepared)
    found = [content(snapshot) for snapshot in taken]
    assert old != new
    assert old in found and new in found
    assert all(state in (old, new) for state in found)


@pytest.mark.parametrize("change", CHANGES)
def test_a_failure_at_any_write_leaves_old_or_new(
    prepared: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    old = content(prepared)
    failures = 0
    while True:
        root = Path(shutil.copytree(prepared, tmp_path / f"run{failures}"))
        failed = fails_at(failures, partial(change, root))
        leftovers = list(root.rglob(".partial-*"))
        state = content(root)
        change(root)
        assert leftovers == []
        assert state in (old, content(root))
        if not failed:
            break
        failures += 1
    assert failures >= 1


def test_the_operating_system_is_asked_to_keep_files_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    objects = LocalObjects(tmp_path / "root")
    monkeypatch.setattr(os, "fsync", record)
    objects.put(KEY, b"content")
    objects.delete(KEY)
    assert synced[0].startswith(".partial-")
    assert synced[1:] == ["contents", "contents"]
