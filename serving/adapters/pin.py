"""A pin: what a request holds so that its revision stays in memory until it ends.

It does not know how the revision was found.
"""

from __future__ import annotations

from threading import Lock

from serving.adapters.records import Revision
from serving.adapters.residency import Residency
from vblora.compact import CompactAdapter


class RevisionPin:
    """`serving.types.Pin` on a resident revision, from its making until `release`."""

    def __init__(
        self, name: str, revision: Revision, residency: Residency, loaded: CompactAdapter | None = None
    ) -> None:
        """Makes the revision resident where it is `loaded`; else raises `KeyError` if it is not."""
        if loaded is None:
            residency.pin(revision.content_hash)
        else:
            residency.put(revision.content_hash, loaded, pinned=True)
        self._name = name
        self._revision = revision
        self._residency = residency
        self._lock = Lock()
        self._held = True

    @property
    def name(self) -> str:
        return self._name

    @property
    def revision(self) -> str:
        """The 16 hex digits shown to clients."""
        return self._revision.revision

    @property
    def content_hash(self) -> str:
        return self._revision.content_hash

    def release(self) -> None:
        """Let go of the revision; any thread, any number of times."""
        with self._lock:
            held, self._held = self._held, False
        if held:
            self._residency.unpin(self.content_hash)
