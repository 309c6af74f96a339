"""Whatever is interrupted, the next start finds the state before or after it, and the bytes of all it names."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from serving.adapters.catalog import Catalog
from serving.errors import ModelNotFound
from serving.store.database import sqlite_url
from tests.adapters import ANN, OPERATOR, Site, adapter_files, registered, replayed
from tests.changer import change_forever
from tests.failpoints import fails_at, snapshots
from tests.postgres import Postgres
from tests.s3 import new_bucket

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
    catalog.add(ANN, "new", *adapter_files(7, bank_seed=1))


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


Copies = Callable[[], Site]


@pytest.fixture
def copies(tmp_path: Path, database_url: str, request: pytest.FixtureRequest) -> Iterator[Copies]:
    """Makes sites with their own data: ann has x with two revisions, as many as are kept; bob's default is the
    shared s."""
    site = Site(tmp_path / "data", keep_revisions=2, url=database_url)
    for seed in (1, 2):
        site.catalog.add(ANN, "x", *adapter_files(seed))
    site.catalog.add(OPERATOR, "s", *adapter_files(3, bank_seed=2), shared=True)
    site.catalog.set_default("ann", "x")
    site.catalog.set_default("bob", "s")
    site.close()
    with ExitStack() as stack:
        made: list[Site] = []

        def copy() -> Site:
            data = Path(shutil.copytree(site.data, tmp_path / f"copy{len(made)}"))
            url = sqlite_url(data / "registry.db")
            if database_url.startswith("postgresql"):
                server: Postgres = request.getfixturevalue("postgres_server")
                url = stack.enter_context(server.database(database_url.rpartition("/")[2]))
            made.append(Site(data, keep_revisions=2, url=url))
            stack.callback(made[-1].close)
            return made[-1]

        yield copy


def after_restart(site: Site) -> dict[str, Any]:
    """What a fresh start on the data of `site` shows; what is stored and not named must go once it is an hour old."""
    site.restart()
    seen = view(site.catalog)
    assert registered(site) == replayed(site)
    assert site.stored() >= site.named()
    assert site.stored_banks() >= site.named_banks()
    site.age_all(4000)
    site.catalog.sweep()
    assert site.stored() == site.named()
    assert site.stored_banks() == site.named_banks()
    assert list(site.data.rglob(".partial-*")) == []
    return seen


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_kill_at_any_moment_leaves_old_or_new(
    copies: Copies, tmp_path: Path, change: Callable[[Catalog], None]
) -> None:
    site = copies()
    old = view(site.catalog)
    taken = snapshots(site.data, tmp_path / "taken", lambda: change(site.catalog))
    new = after_restart(site)
    found = []
    for snapshot in taken:
        left = Site(snapshot, keep_revisions=2)
        found.append(after_restart(left))
        left.close()
    assert old != new
    assert found[0] == old
    assert found[-1] == new
    turn = found.index(new)
    assert found == [old] * turn + [new] * (len(found) - turn)


@pytest.mark.parametrize("change", CHANGES)
def test_a_failure_at_any_write_leaves_old_or_new(copies: Copies, change: Callable[[Catalog], None]) -> None:
    """Seen to fail where bytes are stored after the registry names them."""
    old = view(copies().catalog)
    running: list[dict[str, Any]] = []
    restarted: list[dict[str, Any]] = []
    failed = True
    while failed:
        site = copies()
        failed = fails_at(len(running), partial(change, site.catalog))
        running.append(view(site.catalog))
        restarted.append(after_restart(site))
    new = running[-1]
    assert old != new
    assert len(running) > 4
    assert all(state in (old, new) for state in running + restarted)
    assert running == restarted


@pytest.mark.parametrize("change", [add_new, add_and_prune, activate, delete])
def test_a_failure_at_any_write_to_a_bucket_leaves_old_or_new(
    s3_server: None, tmp_path: Path, change: Callable[[Catalog], None]
) -> None:
    bucket = new_bucket()
    first = Site(tmp_path / "data", keep_revisions=2, bucket=bucket)
    for seed in (1, 2):
        first.catalog.add(ANN, "x", *adapter_files(seed))
    first.catalog.add(ANN, "y", *adapter_files(3, bank_seed=2))
    first.close()
    states: list[dict[str, Any]] = []
    failed, failures = True, 0
    while failed:
        data = Path(shutil.copytree(first.data, tmp_path / f"copy{failures}"))
        site = Site(data, keep_revisions=2, bucket=bucket.copy())
        old = view(site.catalog)
        failed = fails_at(failures, partial(change, site.catalog))
        states.append(view(site.catalog))
        assert after_restart(site) == states[-1]
        site.close()
        failures += 1
    assert failures > 4
    assert old != states[-1]
    assert all(state in (old, states[-1]) for state in states)


def test_after_a_failure_the_running_catalog_goes_on(copies: Copies) -> None:
    failed, failure = True, 0
    while failed:
        site = copies()
        failed = fails_at(failure, partial(add_and_prune, site.catalog))
        failure += 1
        add_and_prune(site.catalog)
        site.catalog.add(ANN, "y", *adapter_files(8))
        running = view(site.catalog)
        assert len(site.stored()) == 4
        assert after_restart(site) == running
    assert failure > 8


def test_bytes_that_could_not_be_removed_are_removed_later(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: str) -> None:
        raise OSError("read-only")

    site.catalog.add(ANN, "x", *adapter_files(1, bank_seed=1))
    _, kept, _ = site.catalog.add(ANN, "y", *adapter_files(2))
    with monkeypatch.context() as broken:
        broken.setattr(site.storage, "delete", refuse)
        site.catalog.delete(ANN, "x")
    with pytest.raises(ModelNotFound):
        site.catalog.pin("ann", "x")
    assert len(site.stored()) == len(site.stored_banks()) == 2
    site.catalog.set_default("ann", "y")
    assert site.stored() == {kept.revision}
    assert site.stored_banks() == site.named_banks()


def test_bytes_of_a_failed_add_are_removed(copies: Copies) -> None:
    site = copies()
    failure = 0
    while fails_at(failure, lambda: site.catalog.add(ANN, "new", *adapter_files(7, bank_seed=1))):
        assert site.stored() == site.named()
        assert site.stored_banks() == site.named_banks()
        if "new" in [info.name for info in site.catalog.list("ann")]:  # only what follows the commit failed
            site.catalog.delete(ANN, "new")
        failure += 1
    assert failure > 5


def test_kills_at_random_moments_leave_a_registry_that_serves(tmp_path: Path, database_url: str) -> None:
    """Seen to fail where bytes are stored after the registry names them."""
    site = Site(tmp_path / "data", keep_revisions=2, url=database_url)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.changer"])
    delays = random.Random(0)
    for seed in range(50):
        mine, theirs = context.Pipe()
        process = context.Process(target=change_forever, args=(site.data, database_url, seed, theirs))
        process.start()
        theirs.close()
        assert mine.recv() == "changing"
        time.sleep(delays.uniform(0.0, 0.2))
        process.kill()
        process.join()
        mine.close()
        process.close()
        site.restart()
        view(site.catalog)
        assert registered(site) == replayed(site)
        assert site.stored() >= site.named()
        assert site.stored_banks() >= site.named_banks()
        assert all(stored.modified > time.time() - 600 for stored in site.storage.sizes().values())
    assert len(site.tables()["audit"]) > 75  # each process was let make one change, and then some were killed in others
    after_restart(site)
    site.close()
