"""Which slot holds which revision: rows of one revision share a slot, unused slots keep theirs until needed.

Knows numbers and content hashes, no tensors: the model runner fills and clears the tables.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot handed to a request. `fresh` says that the revision must still be composed into it."""

    index: int
    fresh: bool


class SlotPool:
    """Slots 1 to `num_slots` − 1. A slot in use is never given to another revision."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, 0, -1))
        self._slot_of: dict[str, int] = {}
        self._users: dict[str, int] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()  # least recently used first
        self.evictions = 0  # of revisions whose slot another one was given

    @property
    def used(self) -> int:
        """Slots that hold a revision some request uses."""
        return len(self._users)

    def acquire(self, revision: str) -> Slot | None:
        """The slot of `revision`, given one if it has none; None when all slots are in use."""
        known = revision in self._slot_of
        if not known and not self._claim(revision):
            return None
        self._idle.pop(revision, None)
        self._users[revision] = self._users.get(revision, 0) + 1
        return Slot(self._slot_of[revision], fresh=not known)

    def _claim(self, revision: str) -> bool:
        if self._free:
            self._slot_of[revision] = self._free.pop()
            return True
        if not self._idle:
            return False
        oldest, _ = self._idle.popitem(last=False)
        self._slot_of[revision] = self._slot_of.pop(oldest)
        self.evictions += 1
        return True

    def release(self, revision: str) -> None:
        """Give back one use of `revision`'s slot."""
        self._users[revision] -= 1
        if not self._users[revision]:
            del self._users[revision]
            self._idle[revision] = None

    def evict(self, gone: Callable[[str], bool]) -> list[int]:
        """Free the idle slots whose revision is `gone`; the caller clears the slots returned."""
        slots = []
        for revision in [revision for revision in self._idle if gone(revision)]:
            del self._idle[revision]
            slots.append(self._slot_of.pop(revision))
        self._free += slots
        return slots
