"""Residency: which adapters are in memory, how often each is pinned, and one copy of every vector bank they share.

It does not know names, tenants, files or slots: its only key is the content hash of a revision.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

from torch import Tensor

from vblora.compact import CompactAdapter


@dataclass(frozen=True, slots=True)
class ResidencyStats:
    """Gauges for the metrics. `bytes` counts top-k metadata without banks; `bank_bytes` counts every bank once.

    `evictions` counts those that had to make room, not those that nobody names any more.
    """

    adapters: int
    bytes: int
    banks: int
    bank_bytes: int
    evictions: int = 0


@dataclass(slots=True)
class _Resident:
    adapter: CompactAdapter
    pins: int = 0
    retired: bool = False


@dataclass(slots=True)
class _SharedBank:
    tensor: Tensor
    users: int = 0


class Residency:
    """Compact adapters by content hash. Every method is thread-safe and returns without waiting for anything slow.

    Metadata and banks take at most `max_bytes` together; None bounds nothing. What was not pinned for the longest time
    goes first. What is pinned stays whatever it takes: then the bound is exceeded, and met again as pins end.

    `retire` says that nobody will ask for a content again: it goes at once if unpinned, else with the last `unpin`;
    putting the same content again before that keeps it. A bank goes with the last adapter that uses it.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self._max_bytes = max_bytes
        self._lock = Lock()
        self._residents: dict[str, _Resident] = {}
        self._banks: dict[str, _SharedBank] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()  # unpinned, the one used last at the end
        self._bytes = 0
        self._bank_bytes = 0
        self._evictions = 0

    def __contains__(self, content_hash: str) -> bool:
        with self._lock:
            return content_hash in self._residents

    def put(self, content_hash: str, adapter: CompactAdapter, *, pinned: bool = False) -> None:
        """Make `adapter` resident, with one more pin where `pinned`, else only if there is room or others may go for
        it. Where the content already is, the copy in memory stays."""
        with self._lock:
            resident = self._residents.get(content_hash)
            if resident is None:
                resident = self._enter(content_hash, adapter)
            resident.retired = False
            if pinned:
                self._pin(content_hash, resident)
            elif not resident.pins:
                self._idle.move_to_end(content_hash)
            self._make_room()

    def get(self, content_hash: str) -> CompactAdapter:
        """The resident adapter; `KeyError` if it is not in memory."""
        with self._lock:
            return self._residents[content_hash].adapter

    def pin(self, content_hash: str) -> None:
        """Keep the adapter in memory until as many calls of `unpin`; `KeyError` if it is not in memory."""
        with self._lock:
            self._pin(content_hash, self._residents[content_hash])

    def unpin(self, content_hash: str) -> None:
        """Undo one `pin`. `KeyError` if the adapter is not in memory, `ValueError` if nothing pins it."""
        with self._lock:
            resident = self._residents[content_hash]
            if resident.pins == 0:
                raise ValueError(f"adapter {content_hash[:16]} is not pinned")
            resident.pins -= 1
            if resident.pins:
                return
            self._idle[content_hash] = None
            if resident.retired:
                self._leave(content_hash)
            self._make_room()

    def pins(self, content_hash: str) -> int:
        """How many pins hold this content; 0 also for a content that is not in memory."""
        with self._lock:
            resident = self._residents.get(content_hash)
            return 0 if resident is None else resident.pins

    def retire(self, content_hash: str) -> None:
        """Drop the adapter, now or after its last `unpin`; a content that is not in memory is ignored."""
        with self._lock:
            resident = self._residents.get(content_hash)
            if resident is None:
                return
            resident.retired = True
            if not resident.pins:
                self._leave(content_hash)

    def stats(self) -> ResidencyStats:
        with self._lock:
            return ResidencyStats(
                len(self._residents), self._bytes, len(self._banks), self._bank_bytes, self._evictions
            )

    def _enter(self, content_hash: str, adapter: CompactAdapter) -> _Resident:
        bank = self._banks.get(adapter.bank_hash)
        if bank is None:
            bank = self._banks[adapter.bank_hash] = _SharedBank(adapter.bank)
            self._bank_bytes += bank.tensor.nbytes
        bank.users += 1
        self._bytes += adapter.nbytes
        self._idle[content_hash] = None
        resident = self._residents[content_hash] = _Resident(adapter.with_bank(bank.tensor))
        return resident

    def _pin(self, content_hash: str, resident: _Resident) -> None:
        resident.pins += 1
        self._idle.pop(content_hash, None)

    def _make_room(self) -> None:
        while self._max_bytes is not None and self._idle and self._bytes + self._bank_bytes > self._max_bytes:
            self._leave(next(iter(self._idle)))
            self._evictions += 1

    def _leave(self, content_hash: str) -> None:
        """Drop an adapter that nothing pins."""
        del self._idle[content_hash]
        adapter = self._residents.pop(content_hash).adapter
        self._bytes -= adapter.nbytes
        bank = self._banks[adapter.bank_hash]
        bank.users -= 1
        if bank.users == 0:
            self._bank_bytes -= self._banks.pop(adapter.bank_hash).tensor.nbytes
