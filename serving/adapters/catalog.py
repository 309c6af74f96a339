"""The catalog: which revision a name means to a tenant, and who may change that.

It does not know HTTP, what an adapter computes, or where state and bytes are kept.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace as replaced
from pathlib import Path
from threading import Lock

from serving.adapters.content import Compact, Content, ContentLoader, check_content, read_folder, resolve_folder
from serving.adapters.pin import RevisionPin
from serving.adapters.residency import Residency
from serving.adapters.state import Adapter, CatalogState, CatalogStore, Default, Owner, Revision
from serving.adapters.storage import RevisionStorage
from serving.errors import InternalError, InvalidAdapter, InvalidValue, ModelNotFound, PermissionDenied
from serving.types import AdapterInfo, Caller, DefaultAdapter, RevisionInfo
from vblora.compact import CompactAdapter

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_log = logging.getLogger(__name__)

Resolve = Callable[[CatalogState], tuple[Adapter, Revision]]


class FileCatalog:
    """`serving.types.AdapterCatalog` over a store for the state and a storage for the bytes.

    Two locks. `_writing` lets one change at a time through, disk included; validation happens before it. `_lock` is
    held only while the new state takes the old one's place and while a revision is looked up and pinned, so no
    request waits for a disk. A state never names content that is not stored: bytes are written before the state that
    names them and removed after the state that does not.
    """

    def __init__(
        self,
        store: CatalogStore,
        storage: RevisionStorage,
        residency: Residency,
        compact: Compact,
        adapter_roots: Sequence[Path] = (),
        reserved: Collection[str] = (),
        keep_revisions: int = 10,
    ) -> None:
        """Take up the stored state; `CatalogStateError` if it cannot be read.

        `compact` fits a checkpoint to the base model or raises `IncompatibleError`; `reserved` are names that no
        adapter may have, beside ``base``; `keep_revisions` bounds the revisions of a name.
        """
        self._store = store
        self._storage = storage
        self._residency = residency
        self._compact = compact
        self._loader = ContentLoader(storage, compact)
        self._roots = tuple(adapter_roots)
        self._reserved = frozenset(reserved) | {"base"}
        self._keep = keep_revisions
        self._lock = Lock()
        self._writing = Lock()
        self._state = store.load()
        # Without any adapter the state may have been lost: then the bytes are not ours to remove.
        self._garbage = set(storage.sizes()) - self._state.contents() if self._state.adapters else set()
        self._remove_garbage()

    def __len__(self) -> int:
        """How many adapters are registered, over all tenants."""
        return sum(len(adapters) for adapters in self._state.adapters.values())

    # --- requests -----------------------------------------------------------------------------------------------

    def pin(self, tenant: str, name: str, revision: str | None = None) -> RevisionPin:
        def resolve(state: CatalogState) -> tuple[Adapter, Revision]:
            _, adapter = _visible(state, tenant, name)
            return adapter, _revision(adapter, revision)

        return self._pin(resolve)

    def pin_default(self, tenant: str) -> RevisionPin | None:
        default = self._state.defaults.get(tenant)
        if default is None:
            return None
        return self._pin(lambda state: _resolve_default(state, default))

    def _pin(self, resolve: Resolve) -> RevisionPin:
        missed: Revision | None = None
        loaded: CompactAdapter | None = None
        while True:
            with self._lock:
                adapter, revision = resolve(self._state)
                if loaded is not None and revision == missed:
                    self._residency.put(revision.content_hash, loaded)
                if revision.content_hash in self._residency:
                    return RevisionPin(adapter.name, revision, self._residency)
            if revision == missed:
                raise InternalError("The stored files of this adapter are missing.")
            missed, loaded = revision, self._load(revision.content_hash)

    def _load(self, content_hash: str) -> CompactAdapter | None:
        """None if the content is not stored, as happens when it is deleted just now."""
        try:
            return self._loader.load(content_hash)
        except KeyError:
            return None

    # --- listings -----------------------------------------------------------------------------------------------

    def list(self, tenant: str) -> Sequence[AdapterInfo]:
        """What the tenant may use, by name."""
        state = self._state
        return [self._info(state, tenant, owner, adapter) for owner, adapter in state.visible(tenant)]

    def get(self, tenant: str, name: str) -> AdapterInfo:
        state = self._state
        return self._info(state, tenant, *_visible(state, tenant, name))

    def _info(self, state: CatalogState, tenant: str | None, owner: Owner, adapter: Adapter) -> AdapterInfo:
        return AdapterInfo(
            name=adapter.name,
            active_revision=_revision(adapter, None).revision,
            revisions=tuple(map(self._revision_info, adapter.revisions)),
            created=adapter.created,
            shared=owner is None,
            is_default=tenant is not None and state.is_default(tenant, owner, adapter.name),
        )

    def _revision_info(self, revision: Revision) -> RevisionInfo:
        resident = revision.content_hash in self._residency
        return RevisionInfo(revision.revision, revision.bytes, revision.created, resident)

    # --- changes ------------------------------------------------------------------------------------------------

    def add(
        self, caller: Caller, name: str, config: bytes, weights: bytes, *, shared: bool = False
    ) -> tuple[AdapterInfo, RevisionInfo, bool]:
        """Validate, store, make active; `shared` is for operators. True for a content that is new under this name."""
        if shared and "operator" not in caller.roles:
            raise PermissionDenied("Only an operator may add a shared adapter.")
        self._check_name(name, "name")
        content = check_content(config, weights, self._compact, uploaded=True)
        owner = None if shared else caller.tenant
        with self._writing:
            adapter, revision, created = self._install(owner, name, content)
            return self._info(self._state, caller.tenant, owner, adapter), self._revision_info(revision), created

    def add_from_path(self, name: str, path: str, *, replace: bool = False) -> tuple[AdapterInfo, RevisionInfo, bool]:
        """Register a shared adapter from a folder that lies under one of the operator's adapter roots.

        `InvalidValue` for any other path, with param ``lora_path``, and for a name that is loaded, unless `replace`.
        """
        self._check_name(name, "lora_name")
        config, weights = read_folder(resolve_folder(path, self._roots), self._roots)
        content = check_content(config, weights, self._compact, uploaded=False)
        with self._writing:
            if not replace and self._state.adapter(None, name) is not None:
                raise InvalidValue(f"An adapter named {name!r} is already loaded.", param="lora_name")
            adapter, revision, created = self._install(None, name, content)
            return self._info(self._state, None, None, adapter), self._revision_info(revision), created

    def register(self, name: str, directory: Path) -> AdapterInfo:
        """Declare a shared adapter at start, from any folder the operator names.

        A declaration that changed since the last start is made active; the same one again changes nothing, so that
        what was activated or uploaded under this name in the meantime survives a restart.
        """
        self._check_name(name, "name")
        content = check_content(*read_folder(directory), self._compact, uploaded=False)
        with self._writing:
            adapter = self._state.adapter(None, name)
            if adapter is None or adapter.declared != content.content_hash:
                adapter, _, _ = self._install(None, name, content, declared=True)
            return self._info(self._state, None, None, adapter)

    def activate(self, caller: Caller, name: str, revision: str) -> AdapterInfo:
        with self._writing:
            owner, adapter = self._managed(caller, name)
            adapter = adapter.with_revision(_revision(adapter, revision))
            self._commit(self._state.with_adapter(owner, adapter))
            return self._info(self._state, caller.tenant, owner, adapter)

    def delete(self, caller: Caller, name: str) -> None:
        with self._writing:
            owner, _ = self._managed(caller, name)
            self._commit(self._state.without_adapter(owner, name))

    def delete_revision(self, caller: Caller, name: str, revision: str) -> None:
        """Remove one revision; `InvalidValue` for the active one, which a bare name could not do without."""
        with self._writing:
            owner, adapter = self._managed(caller, name)
            found = _revision(adapter, revision)
            if found.content_hash == adapter.active:
                raise InvalidValue(
                    "The active revision cannot be deleted: activate another one, or delete the adapter.",
                    param="revision",
                )
            self._commit(self._state.with_adapter(owner, adapter.without_revision(found)))

    def delete_shared(self, name: str) -> None:
        with self._writing:
            if self._state.adapter(None, name) is None:
                raise _not_found(name)
            self._commit(self._state.without_adapter(None, name))

    def set_default(self, tenant: str, name: str | None, revision: str | None = None) -> DefaultAdapter | None:
        """What requests without an adapter use; a `revision` pins it, a bare name follows activation, None ends it."""
        with self._writing:
            if name is None:
                self._commit(self._state.with_default(tenant, None))
                return None
            owner, adapter = _visible(self._state, tenant, name)
            if revision is not None:
                _revision(adapter, revision)
            self._commit(self._state.with_default(tenant, Default(owner, name, revision)))
            return DefaultAdapter(name, revision)

    # --- below, `_writing` is held ------------------------------------------------------------------------------

    def _install(
        self, owner: Owner, name: str, content: Content, *, declared: bool = False
    ) -> tuple[Adapter, Revision, bool]:
        now = int(time.time())
        revision = Revision(content.content_hash, len(content.config) + len(content.weights), now)
        adapter = self._state.adapter(owner, name) or Adapter(name, now, content.content_hash, ())
        known = adapter.find(revision.revision)
        if known is not None and known.content_hash != content.content_hash:
            raise InvalidAdapter(f"Another content of {name!r} has the same revision {revision.revision}.")
        adapter = self._pruned(owner, adapter.with_revision(known or revision))
        if declared:
            adapter = replaced(adapter, declared=content.content_hash)
        self._commit(self._state.with_adapter(owner, adapter), arriving=content)
        return adapter, known or revision, known is None

    def _pruned(self, owner: Owner, adapter: Adapter) -> Adapter:
        def needed(revision: Revision) -> bool:
            pinned = self._residency.pins(revision.content_hash) > 0
            return pinned or self._state.pinned_by_default(owner, adapter.name, revision.revision)

        return adapter.pruned(self._keep, needed)

    def _commit(self, state: CatalogState, *, arriving: Content | None = None) -> None:
        """Bytes, then state, then memory. If this raises, the old state stays in memory and a later change removes
        the bytes, unless it names them."""
        if arriving is not None:
            self._garbage.add(arriving.content_hash)
            self._storage.put(arriving.content_hash, arriving.config, arriving.weights)
        self._store.save(state)
        contents = state.contents()
        gone = self._state.contents() - contents
        with self._lock:
            self._state = state
            if arriving is not None:
                self._residency.put(arriving.content_hash, arriving.compact)
            for content_hash in gone:
                self._residency.retire(content_hash)
        self._garbage = (self._garbage | gone) - contents
        self._remove_garbage()

    def _remove_garbage(self) -> None:
        for content_hash in tuple(self._garbage):
            try:
                self._storage.delete(content_hash)
                self._garbage.discard(content_hash)
            except OSError as error:
                _log.warning("adapter content %s cannot be removed yet: %s", content_hash, error)

    def _managed(self, caller: Caller, name: str) -> tuple[Owner, Adapter]:
        """The adapter that `name` means to the caller, who must be allowed to change it."""
        owner, adapter = _visible(self._state, caller.tenant, name)
        if owner is None and "operator" not in caller.roles:
            raise PermissionDenied(f"The adapter {name!r} is shared: only an operator may change it.")
        return owner, adapter

    def _check_name(self, name: str, param: str) -> None:
        if not _NAME.fullmatch(name):
            raise InvalidValue(
                "An adapter's name is 1 to 64 letters, digits, '.', '_' or '-', the first one a letter or a digit.",
                param=param,
            )
        if name in self._reserved:
            raise InvalidValue(f"The name {name!r} is reserved for the base model.", param=param)


def _visible(state: CatalogState, tenant: str, name: str) -> tuple[Owner, Adapter]:
    found = state.find(tenant, name)
    if found is None:
        raise _not_found(name)
    return found


def _revision(adapter: Adapter, revision: str | None) -> Revision:
    found = adapter.find(revision)
    if found is None:
        raise _not_found(f"{adapter.name}@{revision}")
    return found


def _resolve_default(state: CatalogState, default: Default) -> tuple[Adapter, Revision]:
    adapter = state.adapter(default.owner, default.name)
    if default.deleted or adapter is None:
        raise _not_found(default.name if default.revision is None else f"{default.name}@{default.revision}")
    return adapter, _revision(adapter, default.revision)


def _not_found(name: str) -> ModelNotFound:
    """One wording for what does not exist and for what is another tenant's."""
    return ModelNotFound(f"The model {name!r} does not exist.")
