"""Orphans: stored contents that no revision names, and when their bytes may go.

It does not know how a content lost its last revision.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator
from threading import Lock

from sqlalchemy.exc import SQLAlchemyError

from serving.adapters.registry import Registry
from serving.adapters.storage import RevisionStorage
from serving.types import Caller

GRACE_SECONDS = 3600.0
_BATCH = 500
_SWEEPER = Caller("sweeper", frozenset())
_log = logging.getLogger(__name__)


class Orphans:
    """Removes bytes from a storage, never those that a revision names.

    A removal holds the registry's lock, and whoever adds a revision looks under the same lock that its bytes are still
    there. So a content that somebody is about to name may go and come again, but is there once it is named.
    """

    def __init__(self, registry: Registry, storage: RevisionStorage) -> None:
        self._registry = registry
        self._storage = storage
        self._lock = Lock()
        self._known: set[str] = set()
        # A registry without any adapter beside a storage with contents has lost its state: they may be needed again.
        self._lost = registry.empty and bool(storage.sizes())
        if self._lost:
            _log.warning("the registry knows no adapter, the storage holds some: while this runs, none is swept")

    def add(self, contents: Collection[str]) -> None:
        """Contents that may be orphans, for the next `remove`."""
        with self._lock:
            self._known.update(contents)

    def remove(self) -> None:
        """Remove those added. What cannot be removed now is tried again the next time."""
        with self._lock:
            known = list(self._known)
        for content_hash in known:
            self._remove(content_hash)

    def sweep(self) -> None:
        """Remove all orphans that were put more than an hour ago: a younger one may be another process's upload."""
        if self._lost:
            return
        before = time.time() - GRACE_SECONDS
        old = [content_hash for content_hash, stored in self._storage.sizes().items() if stored.modified < before]
        for batch in _batches(old):
            self.add(set(batch) - self._registry.named(batch))
        self.remove()

    def _remove(self, content_hash: str) -> None:
        try:
            with self._registry.change(_SWEEPER) as change:
                if not change.named([content_hash]):
                    self._storage.delete(content_hash)
        except (OSError, SQLAlchemyError) as error:
            _log.warning("adapter content %s cannot be removed yet: %s", content_hash, error)
            return
        with self._lock:
            self._known.discard(content_hash)


def _batches(contents: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(contents), _BATCH):
        yield contents[start : start + _BATCH]
