"""The catalog's state as data: who has which adapters, their revisions and defaults, and a store that keeps it.

It does not know bytes, memory, roles or errors for clients. States are immutable: a change makes a new one, so a
reader needs no lock and a failed write leaves the old one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from serving.adapters.files import remove_partial, write_file

VERSION = 1
REVISION_DIGITS = 16

Owner = str | None
"""A tenant's name, or None for the shared namespace."""


class CatalogStateError(Exception):
    """The stored state cannot be read. For the operator at start: names the file, which is left as it is."""


@dataclass(frozen=True, slots=True)
class Revision:
    """One content under one name. `bytes` is what its two files take, `created` seconds since the epoch."""

    content_hash: str
    bytes: int
    created: int

    @property
    def revision(self) -> str:
        return self.content_hash[:REVISION_DIGITS]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A name and its revisions, the oldest first. `active` and `declared` are content hashes.

    `declared` is the content that the operator's command line gave last, None where it gave none.
    """

    name: str
    created: int
    active: str
    revisions: tuple[Revision, ...]
    declared: str | None = None

    def find(self, revision: str | None) -> Revision | None:
        """The revision with these 16 digits, the active one for None."""
        wanted = self.active[:REVISION_DIGITS] if revision is None else revision
        return next((known for known in self.revisions if known.revision == wanted), None)

    def with_revision(self, revision: Revision) -> Adapter:
        """The same with `revision` active, appended if it is new."""
        known = any(other.content_hash == revision.content_hash for other in self.revisions)
        revisions = self.revisions if known else (*self.revisions, revision)
        return replace(self, revisions=revisions, active=revision.content_hash)

    def without_revision(self, revision: Revision) -> Adapter:
        return replace(self, revisions=tuple(other for other in self.revisions if other != revision))

    def pruned(self, keep: int, needed: Callable[[Revision], bool]) -> Adapter:
        """At most `keep` revisions, the oldest dropped first, but never the active one or one that is `needed`."""
        surplus = len(self.revisions) - keep
        kept = []
        for revision in self.revisions:
            if surplus > 0 and revision.content_hash != self.active and not needed(revision):
                surplus -= 1
            else:
                kept.append(revision)
        return replace(self, revisions=tuple(kept))


@dataclass(frozen=True, slots=True)
class Default:
    """What a tenant set as its default: an adapter of its own or, with `owner` None, a shared one.

    `revision` None follows activation. `deleted` stays true once what it names is gone, until the tenant sets anew.
    """

    owner: Owner
    name: str
    revision: str | None
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class CatalogState:
    """All adapters by owner and name, and the defaults by tenant."""

    adapters: Mapping[Owner, Mapping[str, Adapter]] = field(default_factory=dict)
    defaults: Mapping[str, Default] = field(default_factory=dict)

    def adapter(self, owner: Owner, name: str) -> Adapter | None:
        return self.adapters.get(owner, {}).get(name)

    def find(self, tenant: str, name: str) -> tuple[Owner, Adapter] | None:
        """What `name` means to a tenant: its own adapter of that name, else the shared one."""
        owners: tuple[Owner, ...] = (tenant, None)
        found = ((owner, self.adapter(owner, name)) for owner in owners)
        return next(((owner, adapter) for owner, adapter in found if adapter is not None), None)

    def visible(self, tenant: str) -> Iterator[tuple[Owner, Adapter]]:
        """What a tenant may use, by name: its own adapters, and the shared ones that these do not hide."""
        own = self.adapters.get(tenant, {})
        shared = self.adapters.get(None, {})
        for name in sorted({*own, *shared}):
            yield (tenant, own[name]) if name in own else (None, shared[name])

    def contents(self) -> set[str]:
        """The content hashes of all revisions."""
        everyone = (adapter for adapters in self.adapters.values() for adapter in adapters.values())
        return {revision.content_hash for adapter in everyone for revision in adapter.revisions}

    def with_adapter(self, owner: Owner, adapter: Adapter) -> CatalogState:
        """The same with `adapter` added or replaced; defaults that pin a revision it lacks become deleted."""
        changed = {**self.adapters.get(owner, {}), adapter.name: adapter}
        state = replace(self, adapters={**self.adapters, owner: changed})
        return state._without_defaults(owner, adapter.name, lambda revision: adapter.find(revision) is None)

    def without_adapter(self, owner: Owner, name: str) -> CatalogState:
        left = {other: adapter for other, adapter in self.adapters[owner].items() if other != name}
        adapters = {other: named for other, named in self.adapters.items() if other != owner}
        state = replace(self, adapters={**adapters, owner: left} if left else adapters)
        return state._without_defaults(owner, name, lambda revision: True)

    def with_default(self, tenant: str, default: Default | None) -> CatalogState:
        others = {other: kept for other, kept in self.defaults.items() if other != tenant}
        return replace(self, defaults=others if default is None else {**others, tenant: default})

    def is_default(self, tenant: str, owner: Owner, name: str) -> bool:
        default = self.defaults.get(tenant)
        return default is not None and not default.deleted and (default.owner, default.name) == (owner, name)

    def pinned_by_default(self, owner: Owner, name: str, revision: str) -> bool:
        wanted = Default(owner, name, revision)
        return any(default == wanted for default in self.defaults.values())

    def _without_defaults(self, owner: Owner, name: str, gone: Callable[[str | None], bool]) -> CatalogState:
        def after(default: Default) -> Default:
            hit = (default.owner, default.name) == (owner, name) and gone(default.revision)
            return replace(default, deleted=True) if hit else default

        return replace(self, defaults={tenant: after(default) for tenant, default in self.defaults.items()})


def to_json(state: CatalogState) -> dict[str, Any]:
    """The state as JSON values; `from_json` is the inverse."""

    def listed(owner: Owner) -> list[dict[str, Any]]:
        return [asdict(adapter) for adapter in state.adapters.get(owner, {}).values()]

    return {
        "version": VERSION,
        "shared": listed(None),
        "tenants": {tenant: listed(tenant) for tenant in state.adapters if tenant is not None},
        "defaults": {tenant: asdict(default) for tenant, default in state.defaults.items()},
    }


def from_json(value: Any) -> CatalogState:
    """Raises `ValueError`, `TypeError`, `KeyError` or `AttributeError` for anything but what `to_json` makes."""
    if value["version"] != VERSION:
        raise ValueError(f"version {value['version']!r} is not {VERSION}, the one that this server writes")
    owners: list[tuple[Owner, Any]] = [(None, value["shared"]), *value["tenants"].items()]
    adapters = {
        owner: {adapter.name: adapter for adapter in map(_adapter, listed)} for owner, listed in owners if listed
    }
    return CatalogState(adapters, {tenant: Default(**default) for tenant, default in value["defaults"].items()})


def _adapter(value: dict[str, Any]) -> Adapter:
    revisions = tuple(_revision(revision) for revision in value["revisions"])
    adapter = Adapter(**{**value, "revisions": revisions})
    if adapter.active not in {revision.content_hash for revision in revisions}:
        raise ValueError(f"the active revision of adapter {adapter.name!r} is not among its revisions")
    return adapter


def _revision(value: dict[str, Any]) -> Revision:
    revision = Revision(**value)
    if len(bytes.fromhex(revision.content_hash)) != 32:
        raise ValueError(f"{revision.content_hash!r} is not a content hash")
    if not isinstance(revision.bytes, int) or not isinstance(revision.created, int):
        raise TypeError("the size and the time of a revision are whole numbers")
    return revision


class CatalogStore(Protocol):
    """Where the state is kept. Only one catalog writes to a store, one `save` at a time."""

    def load(self) -> CatalogState:
        """The state last saved, an empty one at first; `CatalogStateError` if it cannot be read."""

    def save(self, state: CatalogState) -> None:
        """Replace the state, durably and in one piece. If this raises, either state may be the one kept."""


class JsonCatalogStore:
    """The state in one JSON file."""

    def __init__(self, path: Path) -> None:
        """Create the folder of `path` where needed and remove what an interrupted write left there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_partial(path.parent)
        self._path = path

    def load(self) -> CatalogState:
        try:
            return from_json(json.loads(self._path.read_bytes()))
        except FileNotFoundError:
            return CatalogState()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CatalogStateError(
                f"{self._path} does not hold a readable catalog ({type(error).__name__}: {error}); "
                "restore it, or move its whole folder away to start with an empty catalog"
            ) from error

    def save(self, state: CatalogState) -> None:
        write_file(self._path, json.dumps(to_json(state), indent=1).encode())
