"""Whatever is interrupted, the next start finds the state before or after it, and the bytes of all it names."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from serving.adapters.catalog import Catalog
from serving.errors import ModelNotFound
from tests.adapters import ANN, OPERATOR, Site, adapter_files
from tests.failpoints import fails_at, snapshots

TENANTS = ("ann", "bob")


def view(catalog: Catalog) -> dict[str, Any]:
    """What the tenants can see, without times and memory; pins everything, so the bytes must be there."""
    seen: dict[str, Any] = {}
    for tenant in TENANTS:
        try:
            pin = catalog.pin_default(tenant)
            seen[tenant] = None if pin is None else pin.content_hash
        except ModelNotFound:
            seen[tenant] = "deleted"
        for info in catalog.list(tenant):
            pins = [catalog.pin(tenant, info.name, revision.revision) for revision in info.revisions]
            seen[f"{tenant}/{info.name}"] = (info.active_revision, [pin.content_hash for pin in pins], info.is_default)
            for pin in pins:
                pin.release()
    return seen


def add_new(catalog: Catalog) -> None:
    catalog.add(ANN, "new", *adapter_files(7))


def add_and_prune(catalog: Catalog) -> None:
    catalog.add(ANN, "x", *adapter_files(7))


def activate(catalog: Catalog) -> None:
    catalog.activate(ANN, "x", catalog.get("ann", "x").revisions[0].revision)


def delete(catalog: Catalog) -> None:
    catalog.delete(ANN, "x")


def delete_revision(catalog: Catalog) -> None:
    catalog.delete_revision(ANN, "x", catalog.get("ann", "x").revisions[0].revision)


def delete_shared(catalog: Catalog) -> None:
    catalog.delete_shared("s")


def set_default(catalog: Catalog) -> None:
    catalog.set_default("ann", "s")


CHANGES = [add_new, add_and_prune, activate, delete, delete_revision, delete_shared, set_default]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A data folder: ann has x with two revisions, the one limit allows; bob's default is the shared s."""
    site = Site(tmp_path / "prepared", keep_revisions=2)
    for seed in (1, 2):
        site.catalog.add(ANN, "x", *adapter_files(seed))
    site.catalog.add(OPERATOR, "s", *adapter_files(3), shared=True)
    site.catalog.set_default("ann", "x")
    site.catalog.set_default("bob", "s")
    return site.data


def opened(data: Path) -> Site:
    return Site(data, keep_revisions=2)


def after_restart(data: Path) -> dict[str, Any]:
    """What a fresh start on `data` shows; it must hold the bytes of its revisions and nothing else."""
    site = opened(data)
    seen = view(site.catalog)
    named = {
        revision.revision for tenant in TENANTS for info in site.catalog.list(tenant) for revision in info.revisions
    }
    assert site.stored() == named
    assert list(data.rglob(".partial-*")) == []
    return seen


@pytest.mark.parametrize("change", CHANGES)
def test_a_kill_at_any_moment_leaves_old_or_new(
    prepared: Path, tmp_path: Path, change: Callable[[Catalog], None]
) -> None:
    old = view(opened(prepared).catalog)
    catalog = opened(prepared).catalog
    taken = snapshots(prepared, tmp_path / "taken", lambda: change(catalog))
    new = after_restart(prepared)
    found = [after_restart(snapshot) for snapshot in taken]
    assert old != new
    assert found[0] == old
    assert found[-1] == new
    turn = found.index(new)
    assert found == [old] * turn + [new] * (len(found) - turn)


@pytest.mark.parametrize("change", CHANGES)
def test_a_failure_at_any_write_leaves_old_or_new(
    prepared: Path, tmp_path: Path, change: Callable[[Catalog], None]
) -> None:
    old = view(opened(prepared).catalog)
    running: list[dict[str, Any]] = []
    restarted: list[dict[str, Any]] = []
    failed = True
    while failed:
        site = opened(Path(shutil.copytree(prepared, tmp_path / str(len(running)))))
        failed = fails_at(len(running), partial(change, site.catalog))
        running.append(view(site.catalog))
        restarted.append(after_restart(site.data))
    new = running[-1]
    assert old != new
    assert len(running) > 3
    assert all(state in (old, new) for state in running + restarted)


@pytest.mark.parametrize("failure", range(8))
def test_after_a_failure_the_running_catalog_goes_on(prepared: Path, failure: int) -> None:
    site = opened(prepared)
    fails_at(failure, lambda: add_and_prune(site.catalog))
    add_and_prune(site.catalog)
    site.catalog.add(ANN, "y", *adapter_files(8))
    running = view(site.catalog)
    assert len(site.stored()) == 4
    assert after_restart(prepared) == running


def test_bytes_that_could_not_be_removed_are_removed_later(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(content_hash: str) -> None:
        raise OSError("read-only")

    site.catalog.add(ANN, "x", *adapter_files(1))
    _, kept, _ = site.catalog.add(ANN, "y", *adapter_files(2))
    with monkeypatch.context() as broken:
        broken.setattr(site.storage, "delete", refuse)
        site.catalog.delete(ANN, "x")
    with pytest.raises(ModelNotFound):
        site.catalog.pin("ann", "x")
    assert len(site.stored()) == 2
    site.catalog.set_default("ann", "y")
    assert site.stored() == {kept.revision}


def test_bytes_of_a_failed_add_are_removed_by_the_next_change(prepared: Path) -> None:
    site = opened(prepared)
    named = site.stored()
    orphaned, failure = 0, 0
    while fails_at(failure, lambda: site.catalog.add(ANN, "new", *adapter_files(7))):
        orphaned += site.stored() != named
        site.catalog.set_default("ann", "x")
        assert site.stored() == named
        failure += 1
    assert orphaned
