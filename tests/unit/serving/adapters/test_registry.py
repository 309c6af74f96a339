"""The registry in a database: how often it is asked, what several servers see of it, what it tells of whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from benchmarks.bench_registry import register_many
from serving.adapters.catalog import COMMAND_LINE, Catalog
from serving.adapters.records import SHARED, Adapter, Revision
from serving.adapters.registry import Registry
from serving.adapters.residency import Residency
from serving.adapters.storage.local import LocalObjects
from serving.adapters.storage.objects import Kind
from serving.adapters.storage.revisions import RevisionStorage
from serving.errors import InvalidValue, ModelNotFound, PermissionDenied, ServingError
from serving.store.tables import audit, defaults
from serving.types import Caller
from tests.adapters import (
    ANN,
    BASE,
    BOB,
    LAYOUT,
    OPERATOR,
    Site,
    adapter_files,
    registered,
    replayed,
    statements,
    write_files,
)


@pytest.fixture
def beside(site: Site) -> Iterator[Site]:
    """Another server on the registry and the storage of `site`."""
    other = Site(site.data, roots=site.roots, url=site.url)
    yield other
    other.close()


@dataclass
class CountingStorage(RevisionStorage):
    """A storage that knows how often each of its methods was called."""

    root: Path
    calls: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__(LocalObjects(self.root))

    def __getattribute__(self, name: str) -> Any:
        if name in ("put", "get", "bank", "holds", "delete", "sizes"):
            self.calls[name] += 1
        return super().__getattribute__(name)


# --- how often --------------------------------------------------------------------------------------------------


def test_lookups_are_one_statement_however_much_there_is(site: Site) -> None:
    for seed, name in enumerate("abc"):
        site.catalog.add(ANN, name, *adapter_files(seed))
        site.catalog.add(OPERATOR, f"s{name}", *adapter_files(seed), shared=True)
    site.catalog.add(ANN, "a", *adapter_files(7))
    site.catalog.set_default("ann", "a")
    lookups: list[Callable[[], object]] = [
        lambda: site.catalog.pin("ann", "a").release(),
        lambda: site.catalog.pin("ann", "sa").release(),
        lambda: site.catalog.pin_default("ann"),
        lambda: site.catalog.pin_default("bob"),
        lambda: site.catalog.get("ann", "a"),
        lambda: site.catalog.list("ann"),
        lambda: site.catalog.list("ann", 2, "a"),
        lambda: len(site.catalog),
    ]
    for lookup in lookups:
        with statements(site) as seen:
            lookup()
        assert len(seen) == 1


def test_a_pin_that_reads_the_storage_asks_twice(site: Site) -> None:
    site.catalog.add(ANN, "a", *adapter_files(1))
    site.restart()
    with statements(site) as seen:
        site.catalog.pin("ann", "a")
    assert len(seen) == 2


def test_what_is_foreign_costs_what_is_unknown(site: Site, tmp_path: Path) -> None:
    storage = CountingStorage(tmp_path / "data" / "adapters")
    catalog = Catalog(Registry(site.database, BASE), storage, Residency(), LAYOUT.compact, adapter_roots=site.roots)
    _, theirs, _ = catalog.add(BOB, "secret", *adapter_files(1))
    catalog.set_default("bob", "secret")

    def costs(name: str, revision: str) -> list[tuple[list[str], dict[str, int], str]]:
        calls: list[Callable[[], object]] = [
            partial(catalog.pin, "ann", name),
            partial(catalog.pin, "ann", name, revision),
            partial(catalog.get, "ann", name),
            partial(catalog.activate, ANN, name, revision),
            partial(catalog.delete, ANN, name),
            partial(catalog.delete_revision, ANN, name, revision),
            partial(catalog.set_default, "ann", name),
            partial(catalog.set_default, "ann", name, revision),
            partial(catalog.delete_shared, name),
        ]
        found = []
        for call in calls:
            storage.calls.clear()
            with statements(site) as seen, pytest.raises(ModelNotFound) as caught:
                call()
            found.append((seen, dict(storage.calls), caught.value.message.replace(name, "?")))
        return found

    foreign = costs("secret", theirs.revision)
    assert foreign == costs("nobody", "0" * 16)
    assert not any(calls for _, calls, _ in foreign)
    assert all(seen for seen, _, _ in foreign)


@pytest.mark.parametrize("name", ["\0", "a\0", "\ud800", "x" * 10_000, "a/b", ""])
def test_what_cannot_be_a_name_is_never_asked_for(site: Site, name: str) -> None:
    for call in (partial(site.catalog.pin, "ann", name), partial(site.catalog.get, "ann", name)):
        with statements(site) as seen, pytest.raises(ModelNotFound):
            call()
        assert seen == []
    with pytest.raises(ModelNotFound):
        site.catalog.delete_shared(name)
    if name:
        with pytest.raises(InvalidValue) as caught:
            site.catalog.list("ann", 10, name)
        assert caught.value.param == "after"


# --- pages ------------------------------------------------------------------------------------------------------


def test_pages_follow_each_other_by_name(site: Site) -> None:
    own, shared = ["B", "a", "a-1", "b", "z"], ["A", "a", "a.1", "b2", "zz"]
    for name in own:
        site.catalog.add(ANN, name, *adapter_files(1))
    for name in shared:
        site.catalog.add(OPERATOR, name, *adapter_files(2), shared=True)
    site.catalog.add(BOB, "c", *adapter_files(3))
    whole = sorted({*own, *shared})
    assert [info.name for info in site.catalog.list("ann")] == whole
    assert [info.shared for info in site.catalog.list("ann")] == [name not in own for name in whole]
    for limit in range(1, len(whole) + 1):
        seen: list[str] = []
        while page := [info.name for info in site.catalog.list("ann", limit, seen[-1] if seen else None)]:
            assert len(page) == limit or len(seen) + len(page) == len(whole)
            seen += page
        assert seen == whole
    assert [info.name for info in site.catalog.list("bob")] == sorted({"c", *shared})


# --- several servers --------------------------------------------------------------------------------------------


def test_a_server_sees_the_changes_of_another_at_once(site: Site, beside: Site) -> None:
    one, two = site.catalog, beside.catalog
    _, first, _ = one.add(ANN, "x", *adapter_files(1))
    assert two.pin("ann", "x").revision == first.revision
    _, second, _ = two.add(ANN, "x", *adapter_files(2))
    assert one.pin("ann", "x").revision == second.revision
    two.activate(ANN, "x", first.revision)
    assert one.pin("ann", "x").revision == first.revision
    one.set_default("ann", "x", second.revision)
    pin = two.pin_default("ann")
    assert pin is not None and pin.revision == second.revision
    one.delete(ANN, "x")
    for gone in (partial(two.pin, "ann", "x"), partial(two.get, "ann", "x"), partial(two.pin_default, "ann")):
        with pytest.raises(ModelNotFound):
            gone()
    assert len(one) == len(two) == 0
    assert site.stored() == set()


def test_servers_that_change_one_name_at_a_time_wait_for_each_other(site: Site, beside: Site) -> None:
    def change(server: Site) -> None:
        for seed in range(6):
            server.catalog.add(ANN, "x", *adapter_files(seed))
            with suppress(ModelNotFound):  # another has deleted it
                server.catalog.set_default("ann", "x")
                server.catalog.activate(ANN, "x", server.catalog.get("ann", "x").revisions[0].revision)
                if seed % 3 == 2:
                    server.catalog.delete(ANN, "x")

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(change, server) for server in (site, beside) * 2]:
            done.result()
    assert registered(site) == replayed(site)
    assert site.stored() == site.named()


def test_an_upload_survives_the_removal_of_equal_bytes_by_another(site: Site, beside: Site) -> None:
    """Bob's bytes are in the storage, not yet named, when ann's adapter of the same content is deleted elsewhere."""
    site.catalog.add(ANN, "x", *adapter_files(1))
    put = beside.storage.put
    removed: list[set[str]] = []

    def put_then_lose(*arguments: Any) -> None:
        put(*arguments)
        if not removed:
            site.catalog.delete(ANN, "x")
            removed.append(site.stored())

    beside.storage.put = put_then_lose  # type: ignore[method-assign]
    beside.catalog.add(BOB, "y", *adapter_files(1))
    assert removed == [set()]
    site.restart()
    site.catalog.pin("bob", "y").release()


def test_a_sweep_spares_what_is_named_while_it_runs(site: Site, beside: Site) -> None:
    site.catalog.add(ANN, "kept", *adapter_files(9))
    _, revision, _ = site.catalog.add(ANN, "x", *adapter_files(1))
    content_hash = site.catalog.pin("ann", "x").content_hash
    site.catalog.delete(ANN, "x")
    site.storage.put(content_hash, *adapter_files(1))
    site.age(content_hash, 4000)
    sizes = site.storage.sizes

    def sizes_then_name(kind: Kind = "contents") -> Any:
        found = sizes(kind)
        beside.catalog.add(BOB, "y", *adapter_files(1))
        return found

    site.storage.sizes = sizes_then_name  # type: ignore[method-assign]
    site.catalog.sweep()
    assert revision.revision in site.stored()
    beside.restart()
    beside.catalog.pin("bob", "y").release()


# --- what shows -------------------------------------------------------------------------------------------------


def test_equal_bytes_of_another_tenant_change_nothing_that_shows(site: Site) -> None:
    def story() -> list[object]:
        told: list[object] = []
        info, revision, created = site.catalog.add(ANN, "x", *adapter_files(1))
        told += [(revision.bytes, revision.resident, created, info.active_revision, site.catalog.list("ann") == [info])]
        site.restart()
        told += [site.catalog.get("ann", "x").revisions[0].resident]
        if bob:
            site.catalog.pin("bob", "mine").release()
        told += [site.catalog.get("ann", "x").revisions[0].resident]
        site.catalog.pin("ann", "x").release()
        told += [site.catalog.get("ann", "x").revisions[0].resident]
        site.catalog.delete(ANN, "x")
        return [*told, site.catalog.list("ann")]

    bob = False
    alone = story()
    bob = True
    site.catalog.add(BOB, "mine", *adapter_files(1))
    assert story() == alone
    assert site.catalog.get("bob", "mine").revisions[0].resident


def test_each_upload_counts_its_own_bytes(site: Site) -> None:
    config, weights = adapter_files(1)
    site.catalog.add(BOB, "mine", config, weights)
    _, revision, created = site.catalog.add(ANN, "x", config + b" " * 100, weights)
    assert created
    assert revision.bytes == len(config) + 100 + len(weights)
    assert len(site.stored()) == 1


# --- bases ------------------------------------------------------------------------------------------------------


def test_the_adapters_of_another_base_are_others(site: Site) -> None:
    site.catalog.add(ANN, "x", *adapter_files(1))
    site.catalog.set_default("ann", "x")
    other = Catalog(Registry(site.database, "other"), site.storage, Residency(), LAYOUT.compact)
    assert len(other) == 0 and other.list("ann") == [] and other.pin_default("ann") is None
    other.add(ANN, "x", *adapter_files(1))
    other.set_default("ann", "x")
    site.catalog.delete(ANN, "x")
    assert other.pin_default("ann") is not None
    Catalog(Registry(site.database, "other"), site.storage, Residency(), LAYOUT.compact).pin("ann", "x").release()


# --- the audit log ----------------------------------------------------------------------------------------------


def log(site: Site) -> list[tuple[str, str, str, str, str]]:
    with site.database.begin() as connection:
        columns = (audit.c.actor, audit.c.address, audit.c.action, audit.c.tenant, audit.c.subject)
        return [tuple(row) for row in connection.execute(select(*columns).order_by(audit.c.id))]  # type: ignore[misc]


def test_every_change_is_in_the_audit_log(site: Site, tmp_path: Path) -> None:
    ann = Caller("ann", frozenset({"tenant"}), "10.0.0.7")
    site.keep_revisions = 2
    site.restart()
    made = [site.catalog.add(ann, "x", *adapter_files(seed))[1].revision for seed in range(3)]
    site.catalog.activate(ann, "x", made[1])
    site.catalog.set_default("ann", "x", made[2], caller=ann)
    site.catalog.delete_revision(ann, "x", made[2])
    site.catalog.set_default("ann", None, caller=ann)
    site.catalog.delete(ann, "x")
    folder = write_files(tmp_path / "root" / "s", adapter_files(4))
    shared = site.catalog.register("s", folder).active_revision
    site.catalog.add_from_path("t", str(folder), caller=OPERATOR)
    site.catalog.delete_shared("t", caller=OPERATOR)
    site.catalog.set_default("bob", "s")
    me, server, boss = ("ann", "10.0.0.7"), (COMMAND_LINE.tenant, ""), ("boss", "")
    assert log(site) == [
        (*me, "adapter.add", "ann", f"x@{made[0]}"),
        (*me, "adapter.add", "ann", f"x@{made[1]}"),
        (*me, "adapter.add", "ann", f"x@{made[2]}"),
        (*me, "adapter.delete_revision", "ann", f"x@{made[0]}"),
        (*me, "adapter.activate", "ann", f"x@{made[1]}"),
        (*me, "default.set", "ann", f"x@{made[2]}"),
        (*me, "adapter.delete_revision", "ann", f"x@{made[2]}"),
        (*me, "default.set", "ann", ""),
        (*me, "adapter.delete", "ann", "x"),
        (*server, "adapter.add", SHARED, f"s@{shared}"),
        (*boss, "adapter.add", SHARED, f"t@{shared}"),
        (*boss, "adapter.delete", SHARED, "t"),
        ("bob", "", "default.set", "bob", "s"),
    ]


def test_what_is_refused_is_not_in_the_audit_log(site: Site) -> None:
    site.catalog.add(OPERATOR, "s", *adapter_files(1), shared=True)
    before = site.tables()
    refused: list[Callable[[], object]] = [
        partial(site.catalog.delete, ANN, "s"),
        partial(site.catalog.delete, ANN, "nobody"),
        partial(site.catalog.activate, OPERATOR, "s", "0" * 16),
        partial(site.catalog.delete_revision, OPERATOR, "s", site.catalog.get("ann", "s").active_revision),
        partial(site.catalog.set_default, "ann", "s", "0" * 16),
        partial(site.catalog.forget, ANN, "ann"),
    ]
    for call in refused:
        with pytest.raises(ServingError):
            call()
    assert site.tables() == before


# --- tenants that go --------------------------------------------------------------------------------------------


def test_a_forgotten_tenant_leaves_nothing_of_its_own(site: Site) -> None:
    for seed, name in enumerate("xy"):
        site.catalog.add(ANN, name, *adapter_files(seed))
    site.catalog.add(ANN, "x", *adapter_files(5))
    kept = site.catalog.add(BOB, "x", *adapter_files(1))[1].revision
    shared = site.catalog.add(OPERATOR, "s", *adapter_files(3), shared=True)[1].revision
    site.catalog.set_default("ann", "x")
    site.catalog.set_default("bob", "x")
    with pytest.raises(PermissionDenied):
        site.catalog.forget(BOB, "ann")
    site.catalog.forget(OPERATOR, "ann")
    assert [info.name for info in site.catalog.list("ann")] == ["s"]
    assert site.catalog.pin_default("ann") is None
    assert site.catalog.pin_default("bob") is not None
    assert site.stored() == {kept, shared}


# --- revisions that are too many --------------------------------------------------------------------------------


def test_the_oldest_that_nobody_needs_are_too_many() -> None:
    first, second, third = (Revision(digit * 64, "0" * 64, 10, created) for created, digit in enumerate("abc"))
    full = Adapter(1, "ann", "x", 0, third.content_hash, None, False, False, (first, second, third))
    assert full.surplus(2, ()) == [first]
    assert full.surplus(1, ()) == [first, second]
    assert full.surplus(3, ()) == full.surplus(9, ()) == []
    assert full.surplus(2, {first.content_hash}) == [second]
    assert full.surplus(1, {first.content_hash, second.content_hash}) == []
    assert Adapter(1, "ann", "x", 0, first.content_hash, None, False, False, full.revisions).surplus(1, ()) == [
        second,
        third,
    ]


# --- many -------------------------------------------------------------------------------------------------------


def test_ten_thousand_adapters_of_a_thousand_tenants(site: Site) -> None:
    contents = [site.catalog.add(OPERATOR, f"s{seed}", *adapter_files(seed), shared=True) for seed in range(4)]
    register_many(site.database, BASE, tenants=1000, each=10)
    catalog = site.restart()
    assert len(catalog) == 10_004
    shared = [f"s{seed}" for seed in range(4)]
    with statements(site) as seen:
        assert [info.name for info in catalog.list("t999")] == [*(f"a{number}" for number in range(10)), *shared]
        assert [info.name for info in catalog.list("t0", 3, "a7")] == ["a8", "a9", "s0"]
        catalog.pin("t500", "a3").release()
    assert len(seen) == 4
    assert site.residency.stats().adapters == 1
    catalog.forget(OPERATOR, "t0")
    assert len(catalog) == 9_994
    assert len(site.stored()) == len(contents)


def test_defaults_of_the_same_name_do_not_end_each_other(site: Site) -> None:
    for caller in (ANN, BOB):
        site.catalog.add(caller, "x", *adapter_files(1))
        site.catalog.set_default(caller.tenant, "x")
    site.catalog.delete(ANN, "x")
    with site.database.begin() as connection:
        rows = {row.tenant: row.deleted for row in connection.execute(select(defaults))}
    assert rows == {"ann": True, "bob": False}
