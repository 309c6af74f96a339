"""The registry of tenants: who may call, with which keys and limits. Knows no HTTP and asks for no credentials."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from sqlalchemy import Connection, Engine, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from serving.errors import InvalidValue, NotFound
from serving.store.audit import record
from serving.store.tables import adapters, audit, defaults, tenants
from serving.tenancy import keys
from serving.tenancy.records import DEFAULT_TENANT, AuditEntry, IssuedKey, Key, Tenant, TenantChange
from serving.types import Caller, Role

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class TenantRegistry:
    """`serving.tenancy.records.TenantAdmin` over the database."""

    def __init__(self, engine: Engine, changed: Callable[[], None] = lambda: None) -> None:
        """`changed` is called after each change, for those in this process who remember what was."""
        self._engine = engine
        self._reader = engine.execution_options(readonly=True)
        self._changed = changed

    def __bool__(self) -> bool:
        """Whether there is any tenant, disabled ones included."""
        with self._reader.begin() as connection:
            return connection.execute(select(tenants.c.name).limit(1)).first() is not None

    # --- tenants ------------------------------------------------------------------------------------------------

    def tenants(self, limit: int, after: str | None = None) -> Sequence[Tenant]:
        query = select(tenants).where(tenants.c.name > (after or "")).order_by(tenants.c.name).limit(limit)
        with self._reader.begin() as connection:
            return [keys.tenant_of(row) for row in connection.execute(query)]

    def get(self, name: str) -> Tenant:
        with self._reader.begin() as connection:
            return _tenant(connection, name)

    def add(
        self, caller: Caller, name: str, role: Role, *, weight: float = 1.0, quotas: Mapping[str, int] | None = None
    ) -> tuple[Tenant, IssuedKey]:
        _check_new_name(name)
        tenant = Tenant(name, role, False, weight, dict(quotas or {}), int(time.time()))
        with self._change() as connection:
            _insert(connection, tenant)
            _remove_adapters(connection, name)
            _record(connection, caller, "tenant.add", name, role)
            return tenant, _issue(connection, caller, name)

    def change(self, caller: Caller, name: str, change: TenantChange) -> Tenant:
        with self._change() as connection:
            tenant = _tenant(connection, name)
            if change.disabled and not tenant.disabled:
                _check_not_last_operator(connection, tenant)
            quotas = {quota: value for quota, value in {**tenant.quotas, **change.quotas}.items() if value is not None}
            changed = Tenant(
                name,
                tenant.role,
                tenant.disabled if change.disabled is None else change.disabled,
                tenant.weight if change.weight is None else change.weight,
                quotas,
                tenant.created,
            )
            row = {"disabled": changed.disabled, "weight": changed.weight, "quotas": quotas}
            connection.execute(update(tenants).where(tenants.c.name == name).values(row))
            _record(connection, caller, "tenant.change", name, str(change))
            return changed

    def delete(self, caller: Caller, name: str) -> None:
        """Remove a tenant, its keys, and what is registered as its adapters. Its usage stays."""
        with self._change() as connection:
            _check_not_last_operator(connection, _tenant(connection, name))
            _remove_adapters(connection, name)
            connection.execute(delete(tenants).where(tenants.c.name == name))
            _record(connection, caller, "tenant.delete", name, name)

    # --- keys ---------------------------------------------------------------------------------------------------

    def keys(self, name: str, limit: int, after: str | None = None) -> Sequence[Key]:
        with self._reader.begin() as connection:
            _tenant(connection, name)
            return keys.keys_of(connection, name, limit, after)

    def add_key(self, caller: Caller, name: str) -> IssuedKey:
        with self._change() as connection:
            _tenant(connection, name)
            return _issue(connection, caller, name)

    def rotate_key(self, caller: Caller, name: str) -> IssuedKey:
        with self._change() as connection:
            _tenant(connection, name)
            keys.revoke(connection, name)
            _record(connection, caller, "key.revoke", name, "all keys")
            return _issue(connection, caller, name)

    def revoke_key(self, caller: Caller, name: str, key_id: str) -> None:
        with self._change() as connection:
            _tenant(connection, name)
            if not _NAME.fullmatch(key_id) or not keys.revoke(connection, name, key_id):
                raise NotFound("the tenant has no such key")
            _record(connection, caller, "key.revoke", name, key_id)

    # --- audit --------------------------------------------------------------------------------------------------

    def audit(self, limit: int, after: int | None = None) -> Sequence[AuditEntry]:
        query = select(audit).order_by(audit.c.id.desc()).limit(limit)
        if after is not None:
            query = query.where(audit.c.id < after)
        with self._reader.begin() as connection:
            return [AuditEntry(*row) for row in connection.execute(query)]

    @contextmanager
    def _change(self) -> Iterator[Connection]:
        """One change at a time: SQLite's transactions are, elsewhere a lock of the table sees to it."""
        with self._engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("LOCK TABLE tenants IN SHARE ROW EXCLUSIVE MODE")
            yield connection
        self._changed()


def _check_new_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidValue(
            "A tenant's name is 1 to 64 letters, digits, '.', '_' or '-', the first one a letter or a digit.",
            param="name",
        )
    if name == DEFAULT_TENANT:
        raise InvalidValue(
            f"The name {name!r} is reserved: it is everybody's on a server without keys, and whoever got it would get "
            "what was uploaded there.",
            param="name",
        )


def _insert(connection: Connection, tenant: Tenant) -> None:
    row = {"name": tenant.name, "role": tenant.role, "disabled": tenant.disabled, "created": tenant.created}
    try:
        connection.execute(insert(tenants).values(**row, weight=tenant.weight, quotas=tenant.quotas))
    except IntegrityError as error:
        raise InvalidValue(f"There is a tenant {tenant.name!r} already.", param="name") from error


def _tenant(connection: Connection, name: str) -> Tenant:
    query = select(tenants).where(tenants.c.name == name)
    row = connection.execute(query).one_or_none() if _NAME.fullmatch(name) else None
    if row is None:
        raise NotFound("There is no such tenant.")
    return keys.tenant_of(row)


def _check_not_last_operator(connection: Connection, tenant: Tenant) -> None:
    if tenant.role != "operator" or tenant.disabled:
        return
    left = select(tenants.c.name).where(tenants.c.role == "operator", tenants.c.disabled.is_(False)).limit(2)
    if len(connection.execute(left).all()) < 2:
        raise InvalidValue("This is the last operator: nobody could manage the server without it.", param="name")


def _issue(connection: Connection, caller: Caller, tenant: str) -> IssuedKey:
    issued = keys.issue(connection, tenant)
    _record(connection, caller, "key.add", tenant, issued.key.id)
    return issued


def _remove_adapters(connection: Connection, tenant: str) -> None:
    """No tenant may come into what another of its name had, even if an upload of that one ended after its end."""
    connection.execute(delete(adapters).where(adapters.c.owner == tenant))
    connection.execute(delete(defaults).where(defaults.c.tenant == tenant))


def _record(connection: Connection, caller: Caller, action: str, tenant: str, subject: str) -> None:
    record(connection, actor=caller.tenant, address=caller.address, action=action, tenant=tenant, subject=subject)
