"""The registry: what the database says of the adapters of one base model. Every question is one statement.

It does not know bytes, memory, roles or errors for clients. Owners are tenants' names, or `SHARED`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, Select, select

from serving.adapters import queries
from serving.adapters.changes import Change
from serving.adapters.records import Adapter, Default
from serving.store.tables import adapters
from serving.types import Caller


class Registry:
    """The adapters of one base model, as any number of processes keep them in one database. Thread-safe."""

    def __init__(self, database: Engine, base: str) -> None:
        self._database = database
        self._reader = database.execution_options(readonly=True)
        self._base = base

    def __len__(self) -> int:
        """How many adapters there are, over all owners."""
        return int(self._ask(queries.count(self._base))[0][0])

    def find(self, tenant: str, name: str) -> Adapter | None:
        """What `name` means to a tenant: its own adapter of that name, else the shared one."""
        return queries.to_own_or_shared(self._ask(queries.visible(self._base, tenant, name)))

    def list(self, tenant: str, limit: int, after: str) -> list[Adapter]:
        """The first `limit` adapters whose names come `after`, of those that a tenant may use."""
        return queries.to_adapters(self._ask(queries.page(self._base, tenant, limit, after)))

    def default(self, tenant: str) -> Default | None:
        """What the tenant set as its default."""
        return queries.to_default(self._ask(queries.default(self._base, tenant)))

    def named(self, contents: Collection[str]) -> set[str]:
        """Those of `contents` that some revision names, of whatever base."""
        return {row[0] for row in self._ask(queries.named(contents))}

    def watched(self) -> set[str]:
        """The names of the shared adapters that came from the watched folder."""
        return {row[0] for row in self._ask(queries.watched(self._base))}

    def named_banks(self, banks: Collection[str]) -> set[str]:
        """Those of `banks` that some revision names, of whatever base."""
        return {row[0] for row in self._ask(queries.named_banks(banks))}

    def may_use_bank(self, tenant: str, bank_hash: str) -> bool:
        """Whether an adapter of the tenant's own, or a shared one, is on this bank."""
        return bool(self._ask(queries.usable_bank(self._base, tenant, bank_hash)))

    @property
    def empty(self) -> bool:
        """Whether there is no adapter of any base."""
        return not self._ask(select(adapters.c.id).limit(1))

    @contextmanager
    def change(self, caller: Caller) -> Iterator[Change]:
        """One transaction of `caller`'s, kept when the block ends and undone if it raises; one at a time, over all
        processes. If it raises at its end, either state may be the one kept."""
        with self._database.begin() as connection:
            if connection.dialect.name != "sqlite":  # whose transactions come one after the other
                connection.exec_driver_sql("LOCK TABLE adapters IN SHARE ROW EXCLUSIVE MODE")
            yield Change(connection, self._base, caller)

    def _ask(self, statement: Select[Any]) -> Sequence[Any]:
        with self._reader.begin() as connection:
            return connection.execute(statement).all()
