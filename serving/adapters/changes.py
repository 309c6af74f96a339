"""A change of the registry: the rows that one transaction writes, with its lines in the audit log.

It does not know who may change what, bytes or memory.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import ColumnElement, Connection, and_, delete, insert, update

from serving.adapters import queries
from serving.adapters.records import Adapter, Revision
from serving.store.audit import record
from serving.store.tables import adapters, defaults, revisions
from serving.types import Caller


class Change:
    """Reads and writes within one transaction, in which nobody else changes the registry."""

    def __init__(self, connection: Connection, base: str, caller: Caller) -> None:
        self._connection = connection
        self._base = base
        self._caller = caller
        self._removed: set[str] = set()
        self._removed_banks: set[str] = set()

    def find(self, tenant: str, name: str) -> Adapter | None:
        """What `name` means to a tenant: its own adapter of that name, else the shared one."""
        return queries.to_own_or_shared(self._connection.execute(queries.visible(self._base, tenant, name)))

    def find_of(self, owner: str, name: str) -> Adapter | None:
        """The adapter of this very owner."""
        found = self.find(owner, name)
        return None if found is None or found.owner != owner else found

    def owned(self, owner: str) -> list[Adapter]:
        """All adapters of one owner, by name."""
        return queries.to_adapters(self._connection.execute(queries.owned(self._base, owner)))

    def holdings(self, owner: str) -> tuple[int, int]:
        """How many adapters an owner has, and the bytes of all their revisions, whoever else has the same content."""
        row = self._connection.execute(queries.holdings(self._base, owner)).one()
        return int(row[0]), int(row[1])

    def again(self, adapter: Adapter, tenant: str) -> Adapter:
        """The adapter as it is after what was written, and as `tenant` sees it."""
        return self._read(adapter.id, tenant)

    def named(self, contents: Collection[str]) -> set[str]:
        """Those of `contents` that some revision names, of whatever base."""
        return set(self._connection.scalars(queries.named(contents)))

    def named_banks(self, banks: Collection[str]) -> set[str]:
        """Those of `banks` that some revision names, of whatever base."""
        return set(self._connection.scalars(queries.named_banks(banks)))

    def orphans(self) -> set[str]:
        """The contents that lost a revision in this change and that none names any more."""
        return self._removed - self.named(self._removed) if self._removed else set()

    @property
    def left_banks(self) -> set[str]:
        """The banks that lost a revision in this change, whether others name them or not."""
        return self._removed_banks

    def create(self, owner: str, name: str, first: Revision) -> Adapter:
        """Add an adapter with its first revision, which is active."""
        row = {"base": self._base, "owner": owner, "name": name, "created": first.created, "active": first.content_hash}
        (identity,) = self._connection.execute(insert(adapters).values(row).returning(adapters.c.id)).one()
        self._insert(identity, first)
        self._record("adapter.add", owner, f"{name}@{first.revision}")
        return self._read(identity, owner)

    def append(self, adapter: Adapter, revision: Revision) -> None:
        """Add a revision, and make it active."""
        self._insert(adapter.id, revision)
        self._update(adapter, active=revision.content_hash)
        self._record("adapter.add", adapter.owner, f"{adapter.name}@{revision.revision}")

    def activate(self, adapter: Adapter, revision: Revision) -> None:
        """Make one of its revisions the active one."""
        self._update(adapter, active=revision.content_hash)
        self._record("adapter.activate", adapter.owner, f"{adapter.name}@{revision.revision}")

    def declare(self, adapter: Adapter, content_hash: str, *, watched: bool) -> None:
        """Remember what the command line or the watched folder gave; not a change of its own."""
        self._update(adapter, declared=content_hash, watched=watched)

    def remove(self, adapter: Adapter) -> None:
        """Remove an adapter with its revisions; defaults that name it become deleted."""
        self._connection.execute(delete(adapters).where(adapters.c.id == adapter.id))
        self._forget(adapter.revisions)
        self._end_defaults(adapter)
        self._record("adapter.delete", adapter.owner, adapter.name)

    def remove_revisions(self, adapter: Adapter, gone: Sequence[Revision]) -> None:
        """Remove some of its revisions, not the active one; defaults that pin them become deleted."""
        for revision in gone:
            theirs = and_(revisions.c.adapter == adapter.id, revisions.c.content_hash == revision.content_hash)
            self._connection.execute(delete(revisions).where(theirs))
            self._forget([revision])
            self._end_defaults(adapter, defaults.c.revision == revision.revision)
            self._record("adapter.delete_revision", adapter.owner, f"{adapter.name}@{revision.revision}")

    def pinned_by_defaults(self, adapter: Adapter) -> set[str | None]:
        """The revisions of an adapter that some tenant's default pins."""
        return set(self._connection.scalars(queries.pinned_by_defaults(adapter, self._base)))

    def set_default(self, tenant: str, adapter: Adapter, revision: str | None) -> None:
        """Replace a tenant's default; `revision` None follows activation."""
        self._drop_default(tenant)
        row = {"base": self._base, "tenant": tenant, "owner": adapter.owner, "name": adapter.name}
        self._connection.execute(insert(defaults).values(**row, revision=revision, deleted=False))
        subject = adapter.name if revision is None else f"{adapter.name}@{revision}"
        self._record("default.set", tenant, subject)

    def end_default(self, tenant: str) -> None:
        """Let a tenant have no default."""
        if self._drop_default(tenant):
            self._record("default.set", tenant, "")

    def _forget(self, gone: Sequence[Revision]) -> None:
        self._removed |= {revision.content_hash for revision in gone}
        self._removed_banks |= {revision.bank_hash for revision in gone}

    def _drop_default(self, tenant: str) -> bool:
        """Whether there was one."""
        theirs = and_(defaults.c.base == self._base, defaults.c.tenant == tenant)
        return self._connection.execute(delete(defaults).where(theirs)).rowcount > 0

    def _end_defaults(self, adapter: Adapter, *conditions: ColumnElement[bool]) -> None:
        hit = and_(defaults.c.base == self._base, defaults.c.owner == adapter.owner, defaults.c.name == adapter.name)
        self._connection.execute(update(defaults).where(hit, *conditions).values(deleted=True))

    def _read(self, identity: int, tenant: str) -> Adapter:
        (adapter,) = queries.to_adapters(self._connection.execute(queries.numbered(identity, tenant)))
        return adapter

    def _insert(self, identity: int, revision: Revision) -> None:
        row = {"content_hash": revision.content_hash, "bank_hash": revision.bank_hash, "bytes": revision.bytes}
        self._connection.execute(insert(revisions).values(adapter=identity, created=revision.created, **row))

    def _update(self, adapter: Adapter, **values: str | bool) -> None:
        self._connection.execute(update(adapters).where(adapters.c.id == adapter.id).values(values))

    def _record(self, action: str, tenant: str, subject: str) -> None:
        who = self._caller
        record(self._connection, actor=who.tenant, address=who.address, action=action, tenant=tenant, subject=subject)
