"""The questions to the registry's tables as statements, and their rows as records. Knows no connection."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import groupby
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, and_, exists, func, or_, select, true

from serving.adapters.records import SHARED, Adapter, Default, Revision
from serving.store.tables import adapters, defaults, revisions

Rows = Iterable[Row[Any]]

_NAMED_BY_DEFAULT = and_(
    defaults.c.base == adapters.c.base,
    defaults.c.owner == adapters.c.owner,
    defaults.c.name == adapters.c.name,
    ~defaults.c.deleted,
)


def visible(base: str, tenant: str, name: str) -> Select[Any]:
    """A tenant's own adapter and the shared one of this name."""
    return _adapters(tenant).where(
        adapters.c.base == base, adapters.c.owner.in_((tenant, SHARED)), adapters.c.name == name
    )


def numbered(identity: int, tenant: str) -> Select[Any]:
    """The adapter with this id, as `tenant` sees it."""
    return _adapters(tenant).where(adapters.c.id == identity)


def owned(base: str, owner: str) -> Select[Any]:
    """All adapters of one owner."""
    return _adapters(owner).where(adapters.c.base == base, adapters.c.owner == owner)


def page(base: str, tenant: str, limit: int, after: str) -> Select[Any]:
    """The first `limit` adapters whose names come `after`, of those that a tenant may use: its own, and the shared
    ones that these do not hide."""
    own = adapters.alias("own")
    hidden = exists().where(own.c.base == base, own.c.owner == tenant, own.c.name == adapters.c.name)
    usable = or_(adapters.c.owner == tenant, and_(adapters.c.owner == SHARED, ~hidden))
    ids = (
        select(adapters.c.id)
        .where(adapters.c.base == base, adapters.c.owner.in_((tenant, SHARED)), usable, adapters.c.name > after)
        .order_by(adapters.c.name)
        .limit(limit)
    )
    return _adapters(tenant).where(adapters.c.id.in_(ids))


def default(base: str, tenant: str) -> Select[Any]:
    """The default that a tenant set, with the adapter that it names if that is still there."""
    return (
        select(*_columns(true()), defaults.c.name.label("wanted"), defaults.c.revision.label("wanted_revision"))
        .select_from(defaults)
        .outerjoin(adapters, _NAMED_BY_DEFAULT)
        .outerjoin(revisions, revisions.c.adapter == adapters.c.id)
        .where(defaults.c.base == base, defaults.c.tenant == tenant)
        .order_by(revisions.c.id)
    )


def watched(base: str) -> Select[Any]:
    """The names of the adapters that came from the watched folder."""
    return select(adapters.c.name).where(
        adapters.c.base == base, adapters.c.owner == SHARED, adapters.c.watched == true()
    )


def count(base: str) -> Select[Any]:
    """How many adapters there are, over all owners."""
    return select(func.count()).select_from(adapters).where(adapters.c.base == base)


def holdings(base: str, owner: str) -> Select[Any]:
    """How many adapters an owner has, and the bytes of all their revisions."""
    return (
        select(func.count(adapters.c.id.distinct()), func.coalesce(func.sum(revisions.c.bytes), 0))
        .select_from(adapters)
        .outerjoin(revisions, revisions.c.adapter == adapters.c.id)
        .where(adapters.c.base == base, adapters.c.owner == owner)
    )


def named(contents: Collection[str]) -> Select[Any]:
    """Those of `contents` that some revision names, of whatever base."""
    return select(revisions.c.content_hash).where(revisions.c.content_hash.in_(contents)).distinct()


def named_banks(banks: Collection[str]) -> Select[Any]:
    """Those of `banks` that some revision names, of whatever base."""
    return select(revisions.c.bank_hash).where(revisions.c.bank_hash.in_(banks)).distinct()


def usable_bank(base: str, tenant: str, bank_hash: str) -> Select[Any]:
    """The bank with this hash, if an adapter that a tenant may use is on it: its own, or a shared one."""
    return (
        select(revisions.c.bank_hash)
        .join(adapters, revisions.c.adapter == adapters.c.id)
        .where(adapters.c.base == base, adapters.c.owner.in_((tenant, SHARED)), revisions.c.bank_hash == bank_hash)
        .limit(1)
    )


def pinned_by_defaults(adapter: Adapter, base: str) -> Select[Any]:
    """The revisions of an adapter that some tenant's default pins."""
    return (
        select(defaults.c.revision)
        .where(defaults.c.base == base, defaults.c.owner == adapter.owner, defaults.c.name == adapter.name)
        .where(defaults.c.revision.is_not(None), ~defaults.c.deleted)
        .distinct()
    )


def to_adapters(rows: Rows) -> list[Adapter]:
    """The adapters in `rows`, in their order."""
    return [_adapter(list(group)) for _, group in groupby(rows, lambda row: row.id)]


def to_own_or_shared(rows: Rows) -> Adapter | None:
    """Of up to two adapters the tenant's own."""
    return min(to_adapters(rows), key=lambda adapter: adapter.shared, default=None)


def to_default(rows: Rows) -> Default | None:
    """The answer to `default`."""
    found = list(rows)
    if not found:
        return None
    adapter = None if found[0].id is None else _adapter(found)
    return Default(found[0].wanted, found[0].wanted_revision, adapter)


def _adapters(tenant: str) -> Select[Any]:
    chosen = and_(_NAMED_BY_DEFAULT, defaults.c.tenant == tenant)
    return (
        select(*_columns(defaults.c.tenant.is_not(None)))
        .select_from(adapters)
        .join(revisions, revisions.c.adapter == adapters.c.id)
        .outerjoin(defaults, chosen)
        .order_by(adapters.c.name, adapters.c.id, revisions.c.id)
    )


def _columns(is_default: ColumnElement[bool]) -> list[ColumnElement[Any]]:
    return [
        *(adapters.c[name] for name in ("id", "owner", "name", "created", "active", "declared", "watched")),
        *(revisions.c[name] for name in ("content_hash", "bank_hash", "bytes")),
        revisions.c.created.label("revision_created"),
        is_default.label("is_default"),
    ]


def _adapter(rows: list[Row[Any]]) -> Adapter:
    first = rows[0]
    return Adapter(
        id=first.id,
        owner=first.owner,
        name=first.name,
        created=first.created,
        active=first.active,
        declared=first.declared,
        watched=bool(first.watched),
        is_default=bool(first.is_default),
        revisions=tuple(Revision(row.content_hash, row.bank_hash, row.bytes, row.revision_created) for row in rows),
    )
