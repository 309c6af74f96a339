"""The catalog: which revision a name means to a tenant, and who may change that.

It does not know HTTP, what an adapter computes, or where state and bytes are kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from serving.adapters.banks import Banks
from serving.adapters.changes import Change
from serving.adapters.content import (
    Compact,
    ContentLoader,
    check_content,
    read_folder,
    resolve_folder,
    stored_files_are,
)
from serving.adapters.declarations import COMMAND_LINE, Declarations
from serving.adapters.pin import RevisionPin
from serving.adapters.records import SHARED, Adapter, Default, Revision
from serving.adapters.registry import Registry
from serving.adapters.residency import Residency
from serving.adapters.sightings import Sightings
from serving.adapters.storage.revisions import RevisionStorage
from serving.adapters.writer import Writer
from serving.errors import InvalidValue, ModelNotFound, PermissionDenied
from serving.types import MAX_PAGE, AdapterInfo, Caller, DefaultAdapter, HoldingsCheck, RevisionInfo
from vblora.compact import CompactAdapter

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_GRAMMAR = "1 to 64 letters, digits, '.', '_' or '-', the first one a letter or a digit"

Found = tuple[Adapter, Revision]


class _NoDefaultError(Exception):
    """The tenant never set a default, or ended it."""


class Catalog:
    """`serving.types.AdapterCatalog` over a registry for the state and a storage for the bytes.

    Nothing of the registry is kept here: every request asks it, so several processes may serve one registry. Bytes are
    written before the transaction that names them and removed after the one that does not; memory comes last.

    A revision that was read from the storage is put into memory while it is still named, and what is no longer named
    is taken out, both under the writer's lock of memory: so nothing stays that nobody can ask for.
    """

    def __init__(
        self,
        registry: Registry,
        storage: RevisionStorage,
        residency: Residency,
        compact: Compact,
        adapter_roots: Sequence[Path] = (),
        reserved: Collection[str] = (),
        keep_revisions: int = 10,
    ) -> None:
        """`compact` fits a checkpoint to the base model or raises `IncompatibleError`; `reserved` are names that no
        adapter may have, beside ``base``; `keep_revisions` bounds the revisions of a name."""
        self._registry = registry
        self._residency = residency
        self._sightings = Sightings(residency)
        self._compact = compact
        self._loader = ContentLoader(storage, compact)
        self._banks = Banks(registry, storage)
        self._roots = tuple(adapter_roots)
        self._reserved = frozenset(reserved) | {"base"}
        self._writer = Writer(registry, storage, residency, keep_revisions)
        self._writer.sweep()
        self.declared = Declarations(registry, self._writer, compact, self._check_name)

    def __len__(self) -> int:
        """How many adapters are registered, over all tenants."""
        return len(self._registry)

    def sweep(self) -> None:
        """Remove stored bytes that no adapter has named for an hour: what interrupted changes left."""
        self._writer.sweep()

    # --- requests -----------------------------------------------------------------------------------------------

    def pin(self, tenant: str, name: str, revision: str | None = None) -> RevisionPin:
        def resolve() -> Found:
            adapter = self._find(tenant, name)
            return adapter, _revision(adapter, revision)

        return self._pin(resolve)

    def pin_default(self, tenant: str) -> RevisionPin | None:
        try:
            return self._pin(lambda: _chosen(self._registry.default(tenant)))
        except _NoDefaultError:
            return None

    def _pin(self, resolve: Callable[[], Found]) -> RevisionPin:
        adapter, revision = resolve()
        while True:
            pin = self._hold(adapter, revision)
            if pin is not None:
                return pin
            missed, loaded = revision, self._load(revision.content_hash)
            with self._writer.memory:
                adapter, revision = resolve()
                if revision == missed:
                    if loaded is None:
                        raise stored_files_are("missing")
                    pin = self._hold(adapter, revision, loaded)
            if pin is not None:
                return pin

    def _hold(self, adapter: Adapter, revision: Revision, loaded: CompactAdapter | None = None) -> RevisionPin | None:
        """A pin on the revision, None if it is not resident, nor `loaded` for that."""
        try:
            pin = RevisionPin(adapter.name, revision, self._residency, loaded)
        except KeyError:
            return None
        self._sightings.add(adapter.owner, revision.content_hash)
        return pin

    def _load(self, content_hash: str) -> CompactAdapter | None:
        """None if the content is not stored, as happens when it is deleted just now."""
        try:
            return self._loader.load(content_hash)
        except KeyError:
            return None

    # --- listings -----------------------------------------------------------------------------------------------

    def list(self, tenant: str, limit: int = MAX_PAGE, after: str | None = None) -> Sequence[AdapterInfo]:
        """What the tenant may use, by name: at most `limit`, those `after` a name."""
        if after is not None and not _NAME.fullmatch(after):
            raise InvalidValue(f"after: an adapter's name is {_GRAMMAR}.", param="after")
        return [self._info(adapter) for adapter in self._registry.list(tenant, limit, after or "")]

    def get(self, tenant: str, name: str) -> AdapterInfo:
        return self._info(self._find(tenant, name))

    def _info(self, adapter: Adapter) -> AdapterInfo:
        return AdapterInfo(
            name=adapter.name,
            active_revision=_revision(adapter, None).revision,
            revisions=tuple(self._revision_info(adapter, revision) for revision in adapter.revisions),
            created=adapter.created,
            shared=adapter.shared,
            is_default=adapter.is_default,
        )

    def _revision_info(self, adapter: Adapter, revision: Revision) -> RevisionInfo:
        resident = self._sightings.has(adapter.owner, revision.content_hash)
        return RevisionInfo(revision.revision, revision.bytes, revision.created, resident)

    # --- changes ------------------------------------------------------------------------------------------------

    def add(
        self,
        caller: Caller,
        name: str,
        config: bytes,
        weights: bytes,
        *,
        shared: bool = False,
        within: HoldingsCheck | None = None,
        bank: str | None = None,
    ) -> tuple[AdapterInfo, RevisionInfo, bool]:
        """Validate, store, make active; `shared` is for operators. True for a content that is new under this name,
        unless its owner's holdings would then not be `within` their bounds. `bank` names one that `weights` lack."""
        if shared and "operator" not in caller.roles:
            raise PermissionDenied("Only an operator may add a shared adapter.")
        self._check_name(name, "name")
        whole = weights if bank is None else self._banks.complete(caller.tenant, weights, bank)
        content = check_content(config, whole, self._compact, uploaded=True)
        with self._writer.adding(caller, content) as change:
            owner = SHARED if shared else caller.tenant
            added = self._writer.install(change, owner, name, content)
            if within is not None and added[2]:
                within(*change.holdings(owner))
        return self._added(*added)

    def add_from_path(
        self, name: str, path: str, *, replace: bool = False, caller: Caller = COMMAND_LINE
    ) -> tuple[AdapterInfo, RevisionInfo, bool]:
        """Register a shared adapter from a folder that lies under one of the operator's adapter roots.

        `InvalidValue` for any other path, with param ``lora_path``, and for a name that is loaded, unless `replace`.
        """
        self._check_name(name, "lora_name")
        config, weights = read_folder(resolve_folder(path, self._roots), self._roots)
        content = check_content(config, weights, self._compact, uploaded=False)
        with self._writer.adding(caller, content) as change:
            if not replace and change.find_of(SHARED, name) is not None:
                raise InvalidValue(f"An adapter named {name!r} is already loaded.", param="lora_name")
            added = self._writer.install(change, SHARED, name, content)
        return self._added(*added)

    def register(self, name: str, directory: Path) -> AdapterInfo:
        """Declare a shared adapter at start, as the command line does: see `Declarations.register`."""
        return self._info(self.declared.register(name, directory))

    def activate(self, caller: Caller, name: str, revision: str) -> AdapterInfo:
        with self._writer.changing(caller) as change:
            adapter = self._managed(change, caller, name)
            change.activate(adapter, _revision(adapter, revision))
            adapter = change.again(adapter, caller.tenant)
        return self._info(adapter)

    def delete(self, caller: Caller, name: str) -> None:
        with self._writer.changing(caller) as change:
            change.remove(self._managed(change, caller, name))

    def delete_revision(self, caller: Caller, name: str, revision: str) -> None:
        """Remove one revision; `InvalidValue` for the active one, which a bare name could not do without."""
        with self._writer.changing(caller) as change:
            adapter = self._managed(change, caller, name)
            found = _revision(adapter, revision)
            if found.content_hash == adapter.active:
                raise InvalidValue(
                    "The active revision cannot be deleted: activate another one, or delete the adapter.",
                    param="revision",
                )
            change.remove_revisions(adapter, [found])

    def delete_shared(self, name: str, *, caller: Caller = COMMAND_LINE) -> None:
        with self._writer.changing(caller) as change:
            adapter = change.find_of(SHARED, name) if _NAME.fullmatch(name) else None
            if adapter is None:
                raise _not_found(name)
            change.remove(adapter)

    def forget(self, caller: Caller, tenant: str) -> None:
        """Remove all adapters of `tenant` and its default; `PermissionDenied` unless the caller is an operator."""
        if "operator" not in caller.roles:
            raise PermissionDenied("Only an operator may remove a tenant's adapters.")
        with self._writer.changing(caller) as change:
            for adapter in change.owned(tenant):
                change.remove(adapter)
            change.end_default(tenant)

    def set_default(
        self, tenant: str, name: str | None, revision: str | None = None, *, caller: Caller | None = None
    ) -> DefaultAdapter | None:
        """What requests without an adapter use; a `revision` pins it, a bare name follows activation, None ends it."""
        with self._writer.changing(caller or Caller(tenant, frozenset())) as change:
            if name is None:
                change.end_default(tenant)
                return None
            adapter = _visible(change.find, tenant, name)
            if revision is not None:
                _revision(adapter, revision)
            change.set_default(tenant, adapter, revision)
        return DefaultAdapter(name, revision)

    def _added(self, adapter: Adapter, revision: Revision, created: bool) -> tuple[AdapterInfo, RevisionInfo, bool]:
        self._sightings.add(adapter.owner, revision.content_hash)
        return self._info(adapter), self._revision_info(adapter, revision), created

    def _find(self, tenant: str, name: str) -> Adapter:
        return _visible(self._registry.find, tenant, name)

    def _managed(self, change: Change, caller: Caller, name: str) -> Adapter:
        """The adapter that `name` means to the caller, who must be allowed to change it."""
        adapter = _visible(change.find, caller.tenant, name)
        if adapter.shared and "operator" not in caller.roles:
            raise PermissionDenied(f"The adapter {name!r} is shared: only an operator may change it.")
        return adapter

    def _check_name(self, name: str, param: str) -> None:
        if not _NAME.fullmatch(name):
            raise InvalidValue(f"An adapter's name is {_GRAMMAR}.", param=param)
        if name in self._reserved:
            raise InvalidValue(f"The name {name!r} is reserved for the base model.", param=param)


def _visible(find: Callable[[str, str], Adapter | None], tenant: str, name: str) -> Adapter:
    """What `find` answers. A name outside the grammar is nobody's, and may be more than a database takes."""
    adapter = find(tenant, name) if _NAME.fullmatch(name) else None
    if adapter is None:
        raise _not_found(name)
    return adapter


def _revision(adapter: Adapter, revision: str | None) -> Revision:
    found = adapter.find(revision)
    if found is None:
        raise _not_found(f"{adapter.name}@{revision}")
    return found


def _chosen(default: Default | None) -> Found:
    if default is None:
        raise _NoDefaultError
    if default.adapter is None:
        raise _not_found(default.name if default.revision is None else f"{default.name}@{default.revision}")
    return default.adapter, _revision(default.adapter, default.revision)


def _not_found(name: str) -> ModelNotFound:
    """One wording for what does not exist and for what is another tenant's."""
    return ModelNotFound(f"The model {name!r} does not exist.")
