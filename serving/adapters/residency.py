"""Residency: which adapters are in memory, how often each is pinned, and one copy of every vector bank they share.

It does not know names, tenants, files or slots: its only key is the content hash of a revision.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock

from torch import Tensor

from vblora.compact import CompactAdapter


@dataclass(frozen=True, slots=True)
class ResidencyStats:
    """Gauges for the metrics. `bytes` counts top-k metadata without banks; `bank_bytes` counts every bank once."""

    adapters: int
    bytes: int
    banks: int
    bank_bytes: int


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

    A pinned adapter stays until its last `unpin`. `retire` says that nobody will ask for a content again: it goes at
    once if unpinned, else with the last `unpin`; putting the same content again before that keeps it. A bank goes
    with the last adapter that uses it.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._residents: dict[str, _Resident] = {}
        self._banks: dict[str, _SharedBank] = {}

    def __contains__(self, content_hash: str) -> bool:
        with self._lock:
            return content_hash in self._residents

    def put(self, content_hash: str, adapter: CompactAdapter) -> None:
        """Make `adapter` resident, unpinned. Where the content already is, the copy in memory stays."""
        with self._lock:
            resident = self._residents.get(content_hash)
            if resident is None:
                self._residents[content_hash] = _Resident(self._share_bank(adapter))
            else:
                resident.retired = False

    def get(self, content_hash: str) -> CompactAdapter:
        """The resident adapter; `KeyError` if it is not in memory."""
        with self._lock:
            return self._residents[content_hash].adapter

    def pin(self, content_hash: str) -> None:
        """Keep the adapter in memory until as many calls of `unpin`; `KeyError` if it is not in memory."""
        with self._lock:
            self._residents[content_hash].pins += 1

    def unpin(self, content_hash: str) -> None:
        """Undo one `pin`. `KeyError` if the adapter is not in memory, `ValueError` if nothing pins it."""
        with self._lock:
            resident = self._residents[content_hash]
            if resident.pins == 0:
                raise ValueError(f"adapter {content_hash[:16]} is not pinned")
            resident.pins -= 1
            self._drop_if_unused(content_hash, resident)

    def pins(self, content_hash: str) -> int:
        """How many pins hold this content; 0 also for a content that is not in memory."""
        with self._lock:
            resident = self._residents.get(content_hash)
            return 0 if resident is None else resident.pins

    def retire(self, content_hash: str) -> None:
        """Drop the adapter, now or after its last `unpin`; a content that is not in memory is ignored."""
        with self._lock:
            resident = self._residents.get(content_hash)
            if resident is not None:
                resident.retired = True
                self._drop_if_unused(content_hash, resident)

    def stats(self) -> ResidencyStats:
        with self._lock:
            return ResidencyStats(
                adapters=len(self._residents),
                bytes=sum(resident.adapter.nbytes for resident in self._residents.values()),
                banks=len(self._banks),
                bank_bytes=sum(bank.tensor.nbytes for bank in self._banks.values()),
            )

    def _share_bank(self, adapter: CompactAdapter) -> CompactAdapter:
        bank = self._banks.get(adapter.bank_hash)
        if bank is None:
            bank = self._banks[adapter.bank_hash] = _SharedBank(adapter.bank)
        bank.users += 1
        return adapter.with_bank(bank.tensor)

    def _drop_if_unused(self, content_hash: str, resident: _Resident) -> None:
        if resident.pins or not resident.retired:
            return
        del self._residents[content_hash]
        bank = self._banks[resident.adapter.bank_hash]
        bank.users -= 1
        if bank.users == 0:
            del self._banks[resident.adapter.bank_hash]
