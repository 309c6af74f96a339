"""The registry of tenants over a real database: names, keys, limits, the last operator, and a trace of every change."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable

import pytest
from sqlalchemy import Engine, insert, select

from serving.errors import InvalidValue, NotFound, ServingError
from serving.store import tables
from serving.tenancy import keys
from serving.tenancy.directory import SqlTenantDirectory
from serving.tenancy.recent import Recent
from serving.tenancy.records import QUOTAS, IssuedKey, TenantChange
from serving.tenancy.tenants import TenantRegistry
from serving.types import Caller, TenantLimits

OPS = Caller("ops", frozenset({"tenant", "operator"}), "192.0.2.7")
DISABLED = TenantChange(disabled=True)


def trace(registry: TenantRegistry) -> list[tuple[str, str, str]]:
    """Action, tenant and subject of every change, oldest first."""
    entries = registry.audit(1000)[::-1]
    assert {(entry.actor, entry.address) for entry in entries} <= {("ops", "192.0.2.7")}
    assert all(abs(entry.at - time.time()) < 60 for entry in entries)
    return [(entry.action, entry.tenant, entry.subject) for entry in entries]


def owner(database: Engine, issued: IssuedKey) -> str | None:
    """Whose key it is, if it is one."""
    found = SqlTenantDirectory(database).find_key(keys.hash_of(issued.secret))
    return found[1].name if found else None


def test_a_tenant_gets_a_key_that_only_its_hash_is_kept_of(registry: TenantRegistry, database: Engine) -> None:
    assert not registry
    tenant, issued = registry.add(OPS, "acme", "tenant")
    assert registry
    assert re.fullmatch(r"vbk_[A-Za-z0-9_-]{43}", issued.secret)
    assert registry.get("acme") == tenant
    assert tenant.roles == {"tenant"} and not tenant.disabled and tenant.limits == TenantLimits()
    assert registry.keys("acme", 10) == [issued.key]
    assert issued.secret.startswith(issued.key.prefix) and len(issued.key.prefix) == 8
    assert issued.secret not in repr(issued)
    with database.begin() as connection:
        (row,) = connection.execute(select(tables.keys)).mappings()
    assert issued.secret not in str(row)
    assert row["hash"] == keys.hash_of(issued.secret)
    assert owner(database, issued) == "acme"


def test_keys_are_all_different(registry: TenantRegistry) -> None:
    registry.add(OPS, "acme", "tenant")
    issued = [registry.add_key(OPS, "acme") for _ in range(20)]
    assert len({key.secret for key in issued}) == len({key.key.id for key in issued}) == 20


@pytest.mark.parametrize(
    "name", ["", "-a", ".a", "a/b", "a b", "a" * 65, "ä", "a\n", "a\0", "default", "..", "a@b", "command line"]
)
def test_names_outside_the_grammar_and_the_open_modes_are_refused(registry: TenantRegistry, name: str) -> None:
    with pytest.raises(InvalidValue) as raised:
        registry.add(OPS, name, "tenant")
    assert raised.value.param == "name"
    assert not registry
    assert trace(registry) == []


def test_a_name_is_taken_once(registry: TenantRegistry) -> None:
    registry.add(OPS, "acme", "tenant")
    before = trace(registry)
    with pytest.raises(InvalidValue, match="already") as raised:
        registry.add(OPS, "acme", "operator")
    assert raised.value.param == "name"
    assert registry.get("acme").role == "tenant"
    assert trace(registry) == before


def test_a_key_is_revoked_and_the_others_stay(registry: TenantRegistry, database: Engine) -> None:
    _, first = registry.add(OPS, "acme", "tenant")
    second = registry.add_key(OPS, "acme")
    registry.add(OPS, "other", "tenant")
    with pytest.raises(NotFound):
        registry.revoke_key(OPS, "other", first.key.id)  # not its own
    registry.revoke_key(OPS, "acme", first.key.id)
    assert (owner(database, first), owner(database, second)) == (None, "acme")
    assert {key.id: key.revoked is not None for key in registry.keys("acme", 9)} == {
        first.key.id: True,
        second.key.id: False,
    }
    for unknown in (first.key.id, "0" * 16, "", "a\0b"):
        with pytest.raises(NotFound):
            registry.revoke_key(OPS, "acme", unknown)


def test_rotation_revokes_all_keys_of_one_tenant(registry: TenantRegistry, database: Engine) -> None:
    _, first = registry.add(OPS, "acme", "tenant")
    second = registry.add_key(OPS, "acme")
    _, other = registry.add(OPS, "other", "tenant")
    new = registry.rotate_key(OPS, "acme")
    assert [owner(database, key) for key in (first, second, new, other)] == [None, None, "acme", "other"]


def test_limits_are_set_and_unset(registry: TenantRegistry) -> None:
    registry.add(OPS, "acme", "tenant", weight=2.0, quotas={"adapters": 3})
    assert registry.get("acme").limits == TenantLimits(adapters=3, weight=2.0)
    registry.change(OPS, "acme", TenantChange(weight=0.5, quotas={"max_tokens": 0, "adapters": None}))
    assert registry.get("acme").limits == TenantLimits(max_tokens=0, weight=0.5)
    registry.change(OPS, "acme", DISABLED)
    assert registry.get("acme").limits == TenantLimits(max_tokens=0, weight=0.5)
    everything = dict.fromkeys(QUOTAS, 7)
    registry.change(OPS, "acme", TenantChange(quotas=everything))
    assert registry.get("acme").limits == TenantLimits(**everything, weight=0.5)


def test_the_last_operator_stays(registry: TenantRegistry) -> None:
    registry.add(OPS, "acme", "tenant")
    registry.add(OPS, "ops", "operator")
    before = trace(registry)
    for attempt in (lambda: registry.change(OPS, "ops", DISABLED), lambda: registry.delete(OPS, "ops")):
        with pytest.raises(InvalidValue, match="last operator"):
            attempt()
    assert not registry.get("ops").disabled
    assert trace(registry) == before
    registry.add(OPS, "ops2", "operator")
    registry.change(OPS, "ops", DISABLED)
    registry.change(OPS, "ops", DISABLED)  # again: nothing changes
    with pytest.raises(InvalidValue, match="last operator"):
        registry.delete(OPS, "ops2")
    registry.delete(OPS, "ops")
    registry.change(OPS, "acme", DISABLED)
    registry.delete(OPS, "acme")
    assert [tenant.name for tenant in registry.tenants(10)] == ["ops2"]


def test_two_operators_who_disable_each_other_do_not_both_succeed(registry: TenantRegistry) -> None:
    for name in ("a", "b"):
        registry.add(OPS, name, "operator")
    barrier = threading.Barrier(2)

    def disable(name: str) -> None:
        barrier.wait()
        try:
            registry.change(OPS, name, DISABLED)
        except InvalidValue:
            refused.append(name)

    refused: list[str] = []
    threads = [threading.Thread(target=disable, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 1
    assert [tenant.disabled for tenant in registry.tenants(2)].count(False) == 1


def test_with_a_tenant_go_its_keys_and_adapters_and_no_other_of_the_name_gets_them(
    registry: TenantRegistry, database: Engine
) -> None:
    def leave_adapters() -> None:
        row = {"base": "b", "name": "x", "created": 0, "active": "0" * 64}
        default = {"base": "b", "tenant": "acme", "owner": "acme", "name": "x", "deleted": False}
        with database.begin() as connection:
            connection.execute(insert(tables.adapters), [{**row, "owner": "acme"}])
            connection.execute(insert(tables.defaults).values(default))

    def left() -> list[int]:
        with database.begin() as connection:
            owned = (tables.adapters.c.owner, tables.defaults.c.tenant, tables.keys.c.tenant)
            return [len(connection.execute(select(column).where(column == "acme")).all()) for column in owned]

    registry.add(OPS, "acme", "tenant")
    leave_adapters()
    registry.delete(OPS, "acme")
    assert left() == [0, 0, 0]
    leave_adapters()  # by an upload that began before and ended after
    registry.add(OPS, "acme", "tenant")
    assert left() == [0, 0, 1]


def test_lists_are_paged(registry: TenantRegistry) -> None:
    for name in ("c", "a", "b"):
        registry.add(OPS, name, "tenant")
    assert [tenant.name for tenant in registry.tenants(2)] == ["a", "b"]
    assert [tenant.name for tenant in registry.tenants(2, "b")] == ["c"]
    assert registry.tenants(2, "c") == []
    ids = sorted(key.id for key in [*registry.keys("a", 9), *(registry.add_key(OPS, "a").key for _ in range(3))])
    assert [key.id for key in registry.keys("a", 3)] == ids[:3]
    assert [key.id for key in registry.keys("a", 3, ids[2])] == ids[3:]
    newest = registry.audit(2)
    assert [entry.id for entry in newest] == sorted((entry.id for entry in registry.audit(99)), reverse=True)[:2]
    assert registry.audit(1, newest[0].id) == [newest[1]]


def test_every_change_leaves_a_trace_and_nothing_else_does(registry: TenantRegistry) -> None:
    _, first = registry.add(OPS, "acme", "tenant")
    second = registry.add_key(OPS, "acme")
    registry.revoke_key(OPS, "acme", first.key.id)
    third = registry.rotate_key(OPS, "acme")
    registry.change(OPS, "acme", TenantChange(disabled=True, weight=3.0, quotas={"adapters": 1, "max_tokens": None}))
    registry.get("acme"), registry.tenants(9), registry.keys("acme", 9)
    registry.delete(OPS, "acme")
    assert trace(registry) == [
        ("tenant.add", "acme", "tenant"),
        ("key.add", "acme", first.key.id),
        ("key.add", "acme", second.key.id),
        ("key.revoke", "acme", first.key.id),
        ("key.revoke", "acme", "all keys"),
        ("key.add", "acme", third.key.id),
        ("tenant.change", "acme", "disabled=True weight=3.0 adapters=1 max_tokens=None"),
        ("tenant.delete", "acme", "acme"),
    ]


def test_a_change_whose_trace_cannot_be_written_did_not_happen(registry: TenantRegistry, database: Engine) -> None:
    _, issued = registry.add(OPS, "acme", "tenant")
    with database.begin() as connection:
        connection.exec_driver_sql("DROP TABLE audit")
    changes: list[Callable[[], object]] = [
        lambda: registry.add(OPS, "other", "tenant"),
        lambda: registry.change(OPS, "acme", DISABLED),
        lambda: registry.rotate_key(OPS, "acme"),
        lambda: registry.delete(OPS, "acme"),
    ]
    for change in changes:
        with pytest.raises(Exception, match="audit"):
            change()
    assert [(tenant.name, tenant.disabled) for tenant in registry.tenants(9)] == [("acme", False)]
    assert owner(database, issued) == "acme"


def test_who_is_not_there_is_not_found(registry: TenantRegistry) -> None:
    registry.add(OPS, "acme", "tenant")
    calls: list[Callable[[str], object]] = [
        registry.get,
        lambda name: registry.change(OPS, name, DISABLED),
        lambda name: registry.delete(OPS, name),
        lambda name: registry.keys(name, 9),
        lambda name: registry.add_key(OPS, name),
        lambda name: registry.rotate_key(OPS, name),
        lambda name: registry.revoke_key(OPS, name, "0" * 16),
    ]
    for call in calls:
        for name in ("nobody", "", "a\0b", "acme ", "Acme"):
            with pytest.raises(ServingError) as raised:
                call(name)
            assert raised.value.code == "not_found"


def test_the_directory_knows_limits_for_a_second(registry: TenantRegistry, database: Engine) -> None:
    clock = [100.0]
    directory = SqlTenantDirectory(database, Recent(clock=lambda: clock[0]))
    assert directory.limits("acme") == TenantLimits()
    registry.add(OPS, "acme", "tenant", quotas={"adapters": 1})
    assert directory.limits("acme") == TenantLimits()
    clock[0] += 1
    assert directory.limits("acme") == TenantLimits(adapters=1)
    registry.change(OPS, "acme", TenantChange(weight=2))
    assert directory.limits("acme").weight == 1
    directory.forget()
    assert directory.limits("acme").weight == 2


def test_a_keys_look_up_brings_its_tenants_limits_along(registry: TenantRegistry, database: Engine) -> None:
    _, issued = registry.add(OPS, "acme", "tenant", quotas={"adapters": 1})
    directory = SqlTenantDirectory(database)
    assert directory.find_key(keys.hash_of(issued.secret))
    database.dispose()
    with database.begin() as connection:
        connection.exec_driver_sql("DROP TABLE keys")
        connection.exec_driver_sql("DROP TABLE tenants")
    assert directory.limits("acme") == TenantLimits(adapters=1)


def test_others_are_told_after_a_change(database: Engine) -> None:
    seen: list[list[str]] = []
    registry = TenantRegistry(database, lambda: seen.append([tenant.name for tenant in registry.tenants(9)]))
    registry.add(OPS, "acme", "tenant")
    registry.delete(OPS, "acme")
    assert seen == [["acme"], []]
