"""The watched folder over a real catalog: each `poll` is one look."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from serving.adapters import watched
from serving.adapters.content import check_content
from serving.adapters.records import shown_revision
from serving.adapters.watched import WatchedFolder
from serving.errors import ModelNotFound, StorageUnavailable
from serving.store.tables import audit
from tests.adapters import ANN, LAYOUT, OPERATOR, Site, adapter_files, write_files
from vblora.checkpoint import CONFIG_FILE, WEIGHTS_FILE


class Watch:
    """A watched folder, and a new look-out on it after each `restart`."""

    def __init__(self, site: Site, root: Path) -> None:
        root.mkdir()
        self.site, self.root = site, root
        self.folder = WatchedFolder(root, site.catalog.declared)

    def restart(self) -> None:
        self.folder = WatchedFolder(self.root, self.site.restart().declared)

    def drop(self, name: str, number: int) -> Path:
        return write_files(self.root / name, adapter_files(number))

    def settle(self) -> None:
        """Twice: what is there when it looks first is acted on when it looks again."""
        self.folder.poll()
        self.folder.poll()

    def names(self) -> list[str]:
        return [info.name for info in self.site.catalog.list("ann")]

    def changes(self) -> list[str]:
        with self.site.database.begin() as connection:
            return [f"{row.action} {row.actor}" for row in connection.execute(select(audit).order_by(audit.c.id))]

    def revision(self, number: int) -> str:
        files = adapter_files(number)
        return shown_revision(check_content(*files, LAYOUT.compact, uploaded=False).content_hash)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings so far."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def watch(site: Site, tmp_path: Path) -> Watch:
    return Watch(site, tmp_path / "watched")


def test_a_folder_becomes_a_shared_adapter_once_it_stays_as_it_is(watch: Watch) -> None:
    folder = watch.drop("x", 1)
    watch.folder.poll()
    assert watch.names() == []
    os.utime(folder / WEIGHTS_FILE, ns=(1, 1))
    watch.folder.poll()
    assert watch.names() == []
    watch.folder.poll()
    pin = watch.site.catalog.pin("ann", "x")
    assert pin.revision == watch.site.catalog.get("bob", "x").active_revision
    pin.release()
    watch.settle()
    assert watch.changes() == ["adapter.add watched folder"]


def test_what_changes_while_it_is_read_waits(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = watch.drop("x", 1)
    watch.folder.poll()
    read = watched.read_folder

    def read_then_write(*arguments: Any) -> tuple[bytes, bytes]:
        files = read(*arguments)
        (folder / WEIGHTS_FILE).write_bytes(adapter_files(2)[1])
        return files

    monkeypatch.setattr(watched, "read_folder", read_then_write)
    watch.folder.poll()
    assert watch.names() == []
    monkeypatch.undo()
    watch.settle()
    assert watch.site.catalog.get("ann", "x").active_revision == watch.revision(2)


def test_a_changed_folder_is_a_new_active_revision(watch: Watch) -> None:
    watch.drop("x", 1)
    watch.settle()
    watch.drop("x", 2)
    watch.settle()
    info = watch.site.catalog.get("ann", "x")
    assert [known.revision for known in info.revisions] == [watch.revision(1), watch.revision(2)]
    assert info.active_revision == watch.revision(2)
    watch.drop("x", 1)
    watch.settle()
    assert watch.site.catalog.get("ann", "x").active_revision == watch.revision(1)


def test_a_removed_folder_takes_its_adapter_along_but_not_at_the_first_glance(watch: Watch) -> None:
    folder = watch.drop("x", 1)
    watch.settle()
    pin = watch.site.catalog.pin("ann", "x")
    shutil.rmtree(folder)
    watch.folder.poll()
    assert watch.names() == ["x"]
    watch.drop("x", 1)
    watch.settle()
    assert watch.names() == ["x"]
    shutil.rmtree(folder)
    watch.settle()
    assert watch.names() == []
    assert watch.site.residency.get(pin.content_hash).rank == 2
    pin.release()
    assert watch.site.residency.stats().adapters == 0
    with pytest.raises(ModelNotFound):
        watch.site.catalog.pin("ann", "x")


@pytest.mark.parametrize("files", [(b"{}", adapter_files()[1]), (adapter_files()[0], adapter_files()[1][:-9])])
def test_a_faulty_folder_is_told_once_and_tried_again_when_it_changes(
    watch: Watch, files: tuple[bytes, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    write_files(watch.root / "x", files)
    watch.drop("y", 2)
    for _ in range(5):
        watch.folder.poll()
    assert watch.names() == ["y"]
    assert len(told(caplog)) == 1 and "'x'" in told(caplog)[0]
    watch.drop("x", 1)
    watch.settle()
    assert watch.names() == ["x", "y"]
    write_files(watch.root / "x", files)
    watch.settle()
    assert watch.site.catalog.get("ann", "x").active_revision == watch.revision(1)  # what was good goes on
    assert len(told(caplog)) == 2


def test_an_incomplete_folder_waits_for_the_rest(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    folder = watch.drop("x", 1)
    (folder / WEIGHTS_FILE).rename(folder / "later")
    (watch.root / "empty").mkdir()
    (watch.root / "readme.txt").write_text("no folder")
    for _ in range(4):
        watch.folder.poll()
    assert watch.names() == []
    assert len(told(caplog)) == 2
    (folder / "later").rename(folder / WEIGHTS_FILE)
    watch.settle()
    assert watch.names() == ["x"]


def test_names_that_no_adapter_may_have_are_told_and_left(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("base", "tiny", ".hidden", "a b", "x" * 65):
        watch.drop(name, 1)
    for _ in range(3):
        watch.settle()
    assert watch.names() == []
    assert len(told(caplog)) == 5


def test_links_that_leave_the_folder_are_refused(
    watch: Watch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outside = write_files(tmp_path / "outside", adapter_files(1))
    (watch.root / "whole").symlink_to(outside)
    (watch.root / "part").mkdir()
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        (watch.root / "part" / file).symlink_to(outside / file)
    (watch.root / "loop").symlink_to(watch.root / "loop")
    watch.settle()
    assert watch.names() == []
    assert len(told(caplog)) == 3
    (watch.root / "inside").symlink_to(watch.drop("x", 1))
    watch.settle()
    assert watch.names() == ["inside", "x"]


@pytest.mark.parametrize("how", ["upload", "command line"])
def test_a_name_that_is_registered_in_another_way_is_not_taken_over(
    watch: Watch, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if how == "upload":
        watch.site.catalog.add(OPERATOR, "x", *adapter_files(1), shared=True)
    else:
        watch.site.catalog.register("x", write_files(tmp_path / "mine", adapter_files(1)))
    watch.drop("x", 2)
    watch.settle()
    watch.restart()
    watch.settle()
    assert watch.site.catalog.get("ann", "x").active_revision == watch.revision(1)
    assert len(told(caplog)) == 2
    shutil.rmtree(watch.root / "x")
    watch.settle()
    assert watch.names() == ["x"]


def test_what_the_command_line_declares_is_no_longer_the_folders(watch: Watch, tmp_path: Path) -> None:
    watch.drop("x", 1)
    watch.settle()
    watch.site.catalog.register("x", write_files(tmp_path / "mine", adapter_files(1)))
    shutil.rmtree(watch.root / "x")
    watch.settle()
    assert watch.names() == ["x"]


def test_a_tenants_own_adapter_of_that_name_is_another_one(watch: Watch) -> None:
    watch.site.catalog.add(ANN, "x", *adapter_files(1))
    watch.drop("x", 2)
    watch.settle()
    assert watch.site.catalog.get("ann", "x").active_revision == watch.revision(1)
    assert watch.site.catalog.get("bob", "x").active_revision == watch.revision(2)


def test_a_restart_changes_nothing_but_what_changed_meanwhile(watch: Watch) -> None:
    for number, name in enumerate("xyz"):
        watch.drop(name, number)
    watch.settle()
    before = watch.changes()
    watch.restart()
    watch.settle()
    assert watch.changes() == before
    watch.drop("y", 4)
    shutil.rmtree(watch.root / "z")
    watch.restart()
    watch.settle()
    assert watch.names() == ["x", "y"]
    assert watch.site.catalog.get("ann", "y").active_revision == watch.revision(4)
    assert watch.changes() == [*before, "adapter.delete watched folder", "adapter.add watched folder"]


def test_a_folder_that_cannot_be_listed_removes_nothing(watch: Watch) -> None:
    watch.drop("x", 1)
    watch.settle()
    watch.root.rename(watch.root.with_name("away"))
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            watch.folder.poll()
    assert watch.names() == ["x"]
    watch.root.with_name("away").rename(watch.root)
    watch.settle()
    assert watch.names() == ["x"]


def test_what_the_storage_refuses_is_tried_again(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    watch.drop("x", 1)
    watch.folder.poll()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(watch.site.storage, "put", full)
    for _ in range(2):
        with pytest.raises(StorageUnavailable):
            watch.folder.poll()
    monkeypatch.undo()
    watch.folder.poll()
    assert watch.names() == ["x"]


def test_a_poll_ends_early_where_the_server_ends(watch: Watch) -> None:
    watch.drop("x", 1)
    watch.folder.poll()
    watch.folder.close()
    watch.folder.poll()
    assert watch.names() == []
