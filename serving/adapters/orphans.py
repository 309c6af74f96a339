"""Orphans: stored contents and banks that no revision names, and when their bytes may go.

It does not know how one lost its last revision.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Sequence
from threading import Lock
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from serving.adapters.changes import Change
from serving.adapters.registry import Registry
from serving.adapters.storage.objects import KINDS, Kind
from serving.adapters.storage.revisions import RevisionStorage
from serving.types import Caller

GRACE_SECONDS = 3600.0
_BATCH = 500
_AT_ONCE = 16  # removals for which the registry waits
T = TypeVar("T")
Orphan = tuple[Kind, str]
_SWEEPER = Caller("sweeper", frozenset())
_log = logging.getLogger(__name__)


class Orphans:
    """Removes bytes from a storage, never those that a revision names.

    A removal holds the registry's lock, and whoever adds a revision looks under the same lock that its bytes are still
    there. So what somebody is about to name may go and come again, but is there once it is named.
    """

    def __init__(self, registry: Registry, storage: RevisionStorage) -> None:
        self._registry = registry
        self._storage = storage
        self._lock = Lock()
        self._known: set[Orphan] = set()
        # A registry without any adapter beside a storage with contents has lost its state: they may be needed again.
        self._lost = registry.empty and bool(storage.sizes())
        if self._lost:
            _log.warning("the registry knows no adapter, the storage holds some: while this runs, none is swept")

    def add(self, contents: Collection[str], banks: Collection[str]) -> None:
        """Contents and banks that may be orphans, for the next `remove`."""
        with self._lock:
            self._known.update(("contents", digest) for digest in contents)
            self._known.update(("banks", digest) for digest in banks)

    def remove(self) -> None:
        """Remove those added. What cannot be removed now is tried again the next time."""
        with self._lock:
            known = list(self._known)
        for batch in _batches(known, _AT_ONCE):
            self._remove(batch)

    def sweep(self) -> None:
        """Remove all orphans that were put more than an hour ago: a younger one may be another process's upload."""
        if self._lost:
            return
        before = time.time() - GRACE_SECONDS
        for kind in KINDS:
            old = [digest for digest, stored in self._storage.sizes(kind).items() if stored.modified < before]
            for batch in _batches(old, _BATCH):
                unnamed = set(batch) - self._named(kind, batch, self._registry)
                self.add(*((unnamed, ()) if kind == "contents" else ((), unnamed)))
        self.remove()

    def _remove(self, batch: Sequence[Orphan]) -> None:
        gone: list[Orphan] = []
        try:
            with self._registry.change(_SWEEPER) as change:
                for kind in KINDS:
                    digests = [digest for known, digest in batch if known == kind]
                    named = self._named(kind, digests, change) if digests else set()
                    gone += [(kind, digest) for digest in digests if digest in named or self._delete(kind, digest)]
        except (OSError, SQLAlchemyError) as error:
            _log.warning("what no adapter names cannot be removed yet: %s", error)
        with self._lock:
            self._known.difference_update(gone)

    def _delete(self, kind: Kind, digest: str) -> bool:
        try:
            self._storage.delete(digest, kind)
        except OSError as error:
            _log.warning("%s/%s cannot be removed yet: %s", kind, digest, error)
            return False
        return True

    @staticmethod
    def _named(kind: Kind, digests: Collection[str], registry: Registry | Change) -> set[str]:
        return registry.named(digests) if kind == "contents" else registry.named_banks(digests)


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
