"""Through whose adapters a content came into memory or was used there: what an owner may see as resident.

Equal contents of several owners are one in memory. If that alone were shown, an owner could tell that somebody else
has, and uses, the same bytes. It does not know names or how contents come to memory.
"""

from __future__ import annotations

from threading import Lock
from weakref import ref

from serving.adapters.residency import Residency
from vblora.compact import CompactAdapter

_SMALL = 256


class Sightings:
    """Owners by content, each for as long as the very copy that they used is resident. Thread-safe."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._lock = Lock()
        self._seen: dict[str, tuple[ref[CompactAdapter], set[str]]] = {}
        self._sweep_at = _SMALL

    def add(self, owner: str, content_hash: str) -> None:
        """Note that an adapter of `owner` uses a content; one that is not resident is ignored."""
        adapter = self._resident(content_hash)
        if adapter is None:
            return
        with self._lock:
            known = self._seen.get(content_hash)
            if known is None or known[0]() is not adapter:
                known = self._seen[content_hash] = ref(adapter), set()
            known[1].add(owner)
            self._sweep()

    def has(self, owner: str, content_hash: str) -> bool:
        """Whether `owner`'s use brought the content into memory, or met it there, and it still is."""
        with self._lock:
            known = self._seen.get(content_hash)
            if known is None or owner not in known[1]:
                return False
        return known[0]() is not None and known[0]() is self._resident(content_hash)

    def _resident(self, content_hash: str) -> CompactAdapter | None:
        try:
            return self._residency.get(content_hash)
        except KeyError:
            return None

    def _sweep(self) -> None:
        """Forget the copies that are gone, each time that twice as many are known as were left the last time."""
        if len(self._seen) >= self._sweep_at:
            self._seen = {content: known for content, known in self._seen.items() if known[0]() is not None}
            self._sweep_at = max(2 * len(self._seen), _SMALL)
