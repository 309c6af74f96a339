"""From credentials to callers, over a real database: one refusal for all, look-ups that are shared and short-lived."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import Engine, event

from serving.errors import InvalidApiKey, ServingError, Unavailable
from serving.tenancy.authenticator import KeyAuthenticator
from serving.tenancy.directory import SqlTenantDirectory
from serving.tenancy.last_used import LastUsed
from serving.tenancy.recent import Recent
from serving.tenancy.records import TenantChange
from serving.tenancy.tenants import TenantRegistry
from serving.types import Caller

OPS = Caller("ops", frozenset({"operator"}))


class Door:
    """An authenticator and the clock of its memories."""

    def __init__(self, database: Engine) -> None:
        self.time = 100.0
        self.last_used = LastUsed(database)
        directory = SqlTenantDirectory(database, Recent(clock=lambda: self.time))
        self.authenticator = KeyAuthenticator(directory, self.last_used, self._verify, Recent(clock=lambda: self.time))

    @staticmethod
    def _verify(token: str) -> str:
        if not token.startswith("token-of-"):
            raise InvalidApiKey("no token")
        return token.removeprefix("token-of-")

    def ask(self, *headers: str | None) -> list[Caller | str]:
        """The caller of each header, or the error's code; all at once."""

        async def one(header: str | None) -> Caller | str:
            try:
                return await self.authenticator.authenticate(header)
            except ServingError as error:
                return error.code

        async def everyone() -> list[Caller | str]:
            return await asyncio.gather(*map(one, headers))

        return asyncio.run(everyone())


@pytest.fixture
def door(database: Engine) -> Iterator[Door]:
    door = Door(database)
    yield door
    door.authenticator.close()
    door.last_used.close()


@contextmanager
def statements(database: Engine) -> Iterator[list[str]]:
    """The queries that run meanwhile."""
    seen: list[str] = []

    def note(_: object, __: object, statement: str, *___: object) -> None:
        if statement.startswith(("SELECT", "UPDATE", "INSERT")):
            seen.append(statement)

    event.listen(database, "before_cursor_execute", note)
    yield seen
    event.remove(database, "before_cursor_execute", note)


def test_a_key_makes_a_caller_with_its_tenants_roles(door: Door, registry: TenantRegistry) -> None:
    _, tenant = registry.add(OPS, "acme", "tenant")
    _, operator = registry.add(OPS, "root", "operator")
    both: frozenset[str] = frozenset({"tenant", "operator"})
    headers = [f"Bearer {tenant.secret}", f"bearer  {tenant.secret} ", f"Bearer {operator.secret}"]
    assert [(caller.tenant, caller.roles) for caller in door.ask(*headers) if isinstance(caller, Caller)] == [
        ("acme", {"tenant"}),
        ("acme", {"tenant"}),
        ("root", both),
    ]


def test_whatever_else_is_refused_in_the_same_words(door: Door, registry: TenantRegistry) -> None:
    _, disabled = registry.add(OPS, "gone", "tenant")
    registry.change(OPS, "gone", TenantChange(disabled=True))
    _, revoked = registry.add(OPS, "acme", "tenant")
    registry.revoke_key(OPS, "acme", revoked.key.id)
    live = registry.add_key(OPS, "acme").secret
    headers = [
        None,
        "",
        "Bearer",
        "Bearer ",
        live,
        f"Basic {live}",
        f"Bearer {live}x",
        f"Bearer {live[:-1]}",
        f"Bearer {live.upper()}",
        "Bearer vbk_" + "A" * 43,
        "Bearer \udcff",
        f"Bearer {disabled.secret}",
        f"Bearer {revoked.secret}",
        "Bearer token-of-gone",
        "Bearer token-of-nobody",
        "Bearer a.b.c",
    ]
    assert set(door.ask(*headers)) == {"invalid_api_key"}
    messages = set()
    for header in headers:
        with pytest.raises(InvalidApiKey) as raised:
            asyncio.run(door.authenticator.authenticate(header))
        messages.add(raised.value.message)
    assert len(messages) == 1
    assert door.ask(f"Bearer {live}") == [Caller("acme", frozenset({"tenant"}))]


def test_a_token_stands_for_the_tenant_it_names_if_that_is_known(door: Door, registry: TenantRegistry) -> None:
    registry.add(OPS, "acme", "tenant")
    assert door.ask("Bearer token-of-acme") == [Caller("acme", frozenset({"tenant"}))]


def test_what_changed_elsewhere_holds_after_a_second(door: Door, registry: TenantRegistry) -> None:
    _, issued = registry.add(OPS, "acme", "tenant")
    header = f"Bearer {issued.secret}"
    assert door.ask(header, "Bearer token-of-acme", "Bearer token-of-new") == [
        *[Caller("acme", frozenset({"tenant"}))] * 2,
        "invalid_api_key",
    ]
    registry.change(OPS, "acme", TenantChange(disabled=True))
    registry.add(OPS, "new", "tenant")
    door.time += 1
    assert door.ask(header, "Bearer token-of-acme", "Bearer token-of-new") == [
        *["invalid_api_key"] * 2,
        Caller("new", frozenset({"tenant"})),
    ]


def test_what_changed_here_holds_at_once(door: Door, database: Engine) -> None:
    registry = TenantRegistry(database, door.authenticator.forget)
    _, issued = registry.add(OPS, "acme", "tenant")
    for change, expected in ((True, "invalid_api_key"), (False, Caller("acme", frozenset({"tenant"})))):
        registry.change(OPS, "acme", TenantChange(disabled=change))
        assert door.ask(f"Bearer {issued.secret}") == [expected]


def test_requests_of_one_key_share_a_look_up(door: Door, registry: TenantRegistry, database: Engine) -> None:
    _, issued = registry.add(OPS, "acme", "tenant")
    with statements(database) as seen:
        door.ask(*[f"Bearer {issued.secret}"] * 50)
        door.ask(*[f"Bearer {issued.secret}"] * 50)
    assert len([statement for statement in seen if statement.startswith("SELECT")]) == 1
    with statements(database) as seen:
        door.ask(*["Bearer vbk_" + "A" * 43] * 50)
    assert len(seen) == 1


def test_a_database_that_fails_lets_nobody_in_and_calls_nobody_wrong(
    door: Door, registry: TenantRegistry, database: Engine
) -> None:
    _, issued = registry.add(OPS, "acme", "tenant")
    with database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE tenants RENAME TO lost")
    assert door.ask(f"Bearer {issued.secret}") == [Unavailable.code]
    with database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE lost RENAME TO tenants")
    assert door.ask(f"Bearer {issued.secret}") == [Caller("acme", frozenset({"tenant"}))]


def test_a_key_says_when_it_was_last_used(door: Door, registry: TenantRegistry, database: Engine) -> None:
    _, issued = registry.add(OPS, "acme", "tenant")
    assert registry.keys("acme", 1)[0].last_used is None
    with statements(database) as seen:
        door.ask(f"Bearer {issued.secret}")
        door.time += 10
        door.ask(f"Bearer {issued.secret}")
        door.last_used.close()
    assert abs((registry.keys("acme", 1)[0].last_used or 0) - time.time()) < 60
    assert len([statement for statement in seen if statement.startswith("UPDATE")]) == 1


def test_an_unwritten_last_use_is_written_later(registry: TenantRegistry, database: Engine) -> None:
    _, issued = registry.add(OPS, "acme", "tenant")
    last_used = LastUsed(database)
    with database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE keys RENAME TO lost")
    last_used.note(issued.key.id)
    last_used._write()
    with database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE lost RENAME TO keys")
    last_used.close()
    assert registry.keys("acme", 1)[0].last_used
