"""The order of a change: bytes (the bank's first), then the registry, then memory; bytes that nothing names go last.

It does not know who may change what.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from serving.adapters.changes import Change
from serving.adapters.content import Content, storage_fails
from serving.adapters.orphans import Orphans
from serving.adapters.records import Adapter, Revision
from serving.adapters.registry import Registry
from serving.adapters.residency import Residency
from serving.adapters.storage.revisions import RevisionStorage
from serving.errors import InvalidAdapter
from serving.types import Caller

Added = tuple[Adapter, Revision, bool]
"""The adapter after an upload, the uploaded revision, and whether it is new under this name."""


class Writer:
    """Changes of one process, one at a time but for their bytes; other processes' may come between any two steps.

    A crash between two steps leaves the old state or the new one, at worst with bytes that nothing names: these are
    swept later. `memory` is held while contents that nothing names any more are taken out of memory.
    """

    def __init__(self, registry: Registry, storage: RevisionStorage, residency: Residency, keep_revisions: int) -> None:
        self.memory = Lock()
        self._registry = registry
        self._storage = storage
        self._residency = residency
        self._keep = keep_revisions
        self._orphans = Orphans(registry, storage)
        self._writing = Lock()

    def sweep(self) -> None:
        """Remove what interrupted changes left in the storage more than an hour ago."""
        self._orphans.sweep()

    @contextmanager
    def changing(self, caller: Caller) -> Iterator[Change]:
        """A change that is kept when the block ends and undone if it raises."""
        with self._writing, self._change(caller) as change:
            yield change

    @contextmanager
    def adding(self, caller: Caller, content: Content) -> Iterator[Change]:
        """The same, in which a revision may name `content`, whose bytes are stored and whose adapter is resident.

        The bytes are stored before it is this change's turn: others need not wait for a slow storage.
        """
        try:
            self._store(content)
            with self._writing, self._change(caller, content) as change:
                # Somebody may have removed equal bytes since; while this change lasts, nobody can.
                self._store(content, unless_there=True)
                yield change
        except BaseException:  # a refusal, a failure, a signal: bytes that nothing names are nobody's
            self._orphans.add({content.content_hash}, {content.bank_hash})
            self._orphans.remove()
            raise

    def _store(self, content: Content, *, unless_there: bool = False) -> None:
        try:
            if not (unless_there and self._storage.holds(content.content_hash, content.bank_hash)):
                self._storage.put(content.content_hash, content.config, content.weights)
        except OSError as error:
            raise storage_fails() from error

    @contextmanager
    def _change(self, caller: Caller, arriving: Content | None = None) -> Iterator[Change]:
        orphans: set[str] = set()
        banks: set[str] = set()
        try:
            with self._registry.change(caller) as change:
                yield change
                orphans, banks = change.orphans(), change.left_banks
            if arriving is not None:
                with self.memory:
                    self._residency.put(arriving.content_hash, arriving.compact)
        finally:
            self._drop(orphans, banks)

    def _drop(self, orphans: set[str], banks: set[str]) -> None:
        """Take contents out of memory, and out of the storage unless they are named after all: where the end of a
        transaction raised, it may have been kept or not. In memory they are missed by nobody, only read again."""
        with self.memory:
            for content_hash in orphans:
                self._residency.retire(content_hash)
        self._orphans.add(orphans, banks)
        self._orphans.remove()

    def install(self, change: Change, owner: str, name: str, content: Content) -> Added:
        """Make `content` the active revision of an adapter, which comes to be where there is none; the oldest
        revisions that are too many go. Raises `InvalidAdapter` if another content has the same 16 digits."""
        size = len(content.config) + len(content.weights)
        revision = Revision(content.content_hash, content.bank_hash, size, int(time.time()))
        adapter = change.find_of(owner, name)
        if adapter is None:
            return change.create(owner, name, revision), revision, True
        known = adapter.find(revision.revision)
        if known is None:
            change.append(adapter, revision)
        elif known.content_hash == revision.content_hash:
            change.activate(adapter, known)
        else:
            raise InvalidAdapter(f"Another content of {name!r} has the same revision {revision.revision}.")
        adapter = change.again(adapter, owner)
        change.remove_revisions(adapter, adapter.surplus(self._keep, self._needed(change, adapter)))
        return change.again(adapter, owner), known or revision, known is None

    def _needed(self, change: Change, adapter: Adapter) -> set[str]:
        """The contents of an adapter that a request of this process or a default holds."""
        pinned = change.pinned_by_defaults(adapter)
        return {
            known.content_hash
            for known in adapter.revisions
            if known.revision in pinned or self._residency.pins(known.content_hash)
        }
