from __future__ import annotations

from serving.adapters.slots import Slot, SlotPool


def test_rows_of_one_revision_share_a_slot() -> None:
    pool = SlotPool(3)
    assert pool.acquire("a") == Slot(1, fresh=True)
    assert pool.acquire("a") == Slot(1, fresh=False)
    assert pool.used == 1


def test_slot_zero_is_never_handed_out() -> None:
    pool = SlotPool(4)
    slots = [pool.acquire(revision) for revision in "abcd"]
    assert [slot.index if slot else None for slot in slots] == [1, 2, 3, None]


def test_an_idle_slot_keeps_its_revision_until_another_needs_it() -> None:
    pool = SlotPool(2)
    pool.acquire("a")
    pool.release("a")
    assert pool.acquire("a") == Slot(1, fresh=False)
    pool.release("a")
    assert pool.evictions == 0
    assert pool.acquire("b") == Slot(1, fresh=True)
    assert pool.acquire("a") is None
    assert pool.evictions == 1


def test_the_least_recently_used_slot_goes_first() -> None:
    pool = SlotPool(3)
    for revision in "ab":
        pool.acquire(revision)
    pool.release("b")
    pool.release("a")
    assert pool.acquire("c") == Slot(2, fresh=True)
    assert pool.acquire("a") == Slot(1, fresh=False)


def test_a_slot_in_use_is_not_evicted() -> None:
    pool = SlotPool(3)
    for revision in "ab":
        pool.acquire(revision)
    pool.release("b")
    assert pool.evict(lambda revision: True) == [2]
    assert pool.acquire("b") == Slot(2, fresh=True)
