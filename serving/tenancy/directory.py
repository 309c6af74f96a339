"""Look-ups of tenants and of their keys for requests, at most a second old. Changes nothing, knows no HTTP."""

from __future__ import annotations

from sqlalchemy import Engine, select

from serving.store.tables import tenants
from serving.tenancy import keys
from serving.tenancy.recent import Recent
from serving.tenancy.records import Tenant
from serving.types import TenantLimits


class SqlTenantDirectory:
    """`serving.types.TenantDirectory` over the database. A key's look-up brings its tenant along, so that a request's
    limits are there when they are asked for."""

    def __init__(self, engine: Engine, recent: Recent[Tenant | None] | None = None) -> None:
        self._reader = engine.execution_options(readonly=True)
        self._recent: Recent[Tenant | None] = recent or Recent()

    def limits(self, tenant: str) -> TenantLimits:
        found = self.tenant(tenant)
        return found.limits if found else TenantLimits()

    def tenant(self, name: str) -> Tenant | None:
        """The tenant of that name, disabled or not."""
        try:
            return self._recent.get(name)
        except KeyError:
            return self._read(name)

    def find_key(self, digest: str) -> tuple[str, Tenant] | None:
        """The id and the tenant of a key by its hash, always from the database."""
        asked = self._recent.now()
        with self._reader.begin() as connection:
            found = keys.find(connection, digest)
        if found is not None:
            self._recent.put(found[1].name, found[1], asked)
        return found

    def forget(self) -> None:
        """Remember nothing, after a change."""
        self._recent.clear()

    def _read(self, name: str) -> Tenant | None:
        asked = self._recent.now()
        with self._reader.begin() as connection:
            row = connection.execute(select(tenants).where(tenants.c.name == name)).one_or_none()
        tenant = None if row is None else keys.tenant_of(row)
        self._recent.put(name, tenant, asked)
        return tenant
