from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from serving.adapters.residency import Residency, ResidencyStats
from tests.adapters import LAYOUT, small_checkpoint
from vblora.compact import CompactAdapter


def compact(seed: int = 0, bank_seed: int = 0) -> CompactAdapter:
    return LAYOUT.compact(small_checkpoint(seed, bank_seed=bank_seed))


def test_an_adapter_put_is_resident_with_its_content_unchanged() -> None:
    residency, adapter = Residency(), compact()
    assert "a" not in residency
    residency.put("a", adapter)
    assert "a" in residency
    assert torch.equal(residency.get("a").compose(), adapter.compose())


def test_adapters_with_equal_banks_share_one_tensor() -> None:
    residency, first, second = Residency(), compact(1), compact(2)
    assert first.bank.data_ptr() != second.bank.data_ptr()
    residency.put("a", first)
    residency.put("b", second)
    residency.put("c", compact(3, bank_seed=1))
    assert residency.get("a").bank.data_ptr() == residency.get("b").bank.data_ptr()
    assert residency.get("c").bank.data_ptr() != residency.get("a").bank.data_ptr()
    metadata = 2 * first.nbytes + compact(3).nbytes
    assert residency.stats() == ResidencyStats(adapters=3, bytes=metadata, banks=2, bank_bytes=2 * 16 * 8 * 4)


def test_a_bank_goes_with_the_last_adapter_that_uses_it() -> None:
    residency = Residency()
    residency.put("a", compact(1))
    residency.put("b", compact(2))
    residency.retire("a")
    assert residency.stats().banks == 1
    residency.retire("b")
    assert residency.stats() == ResidencyStats(0, 0, 0, 0)


def test_putting_a_content_twice_keeps_the_copy_in_memory() -> None:
    residency = Residency()
    residency.put("a", compact())
    kept = residency.get("a")
    residency.put("a", compact())
    assert residency.get("a") is kept
    residency.retire("a")
    assert residency.stats() == ResidencyStats(0, 0, 0, 0)


def test_a_retired_adapter_stays_until_its_last_pin_is_undone() -> None:
    residency = Residency()
    residency.put("a", compact())
    residency.pin("a")
    residency.pin("a")
    residency.retire("a")
    residency.unpin("a")
    assert residency.pins("a") == 1
    assert residency.get("a").rank == 2
    residency.unpin("a")
    assert "a" not in residency
    assert residency.pins("a") == 0


def test_an_adapter_that_is_not_retired_stays_without_pins() -> None:
    residency = Residency()
    residency.put("a", compact())
    residency.pin("a")
    residency.unpin("a")
    assert "a" in residency


def test_putting_a_retired_content_again_keeps_it() -> None:
    residency = Residency()
    residency.put("a", compact())
    residency.pin("a")
    residency.retire("a")
    residency.put("a", compact())
    residency.unpin("a")
    assert "a" in residency


def test_what_is_absent_cannot_be_read_or_pinned() -> None:
    residency = Residency()
    for call in (residency.get, residency.pin, residency.unpin):
        with pytest.raises(KeyError):
            call("a")
    residency.retire("a")
    assert residency.pins("a") == 0


def test_unpinning_what_nobody_pins_is_refused() -> None:
    residency = Residency()
    residency.put("a", compact())
    with pytest.raises(ValueError, match="not pinned"):
        residency.unpin("a")


def test_counts_are_right_after_many_threads() -> None:
    residency = Residency()
    adapters = {str(number): compact(number, bank_seed=number % 2) for number in range(4)}

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(300):
            key = chance.choice(list(adapters))
            residency.put(key, adapters[key])
            try:
                residency.pin(key)
            except KeyError:
                continue
            residency.retire(key)
            assert residency.get(key).bank_hash == adapters[key].bank_hash
            residency.unpin(key)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    for key in adapters:
        assert residency.pins(key) == 0
        residency.retire(key)
    assert residency.stats() == ResidencyStats(0, 0, 0, 0)


METADATA, BANK = compact().nbytes, 16 * 8 * 4


def resident(residency: Residency) -> set[str]:
    return {key for key in "abcdef" if key in residency}


def fill(residency: Residency, keys: str) -> None:
    for number, key in enumerate(keys):
        residency.put(key, compact(number))


def test_what_was_used_longest_ago_makes_room() -> None:
    residency = Residency(BANK + 3 * METADATA)
    fill(residency, "abc")
    residency.pin("a")
    residency.unpin("a")
    residency.put("b", compact(1))
    fill(residency, "d")
    assert resident(residency) == {"a", "b", "d"}
    fill(residency, "e")
    assert resident(residency) == {"b", "d", "e"}
    assert residency.stats() == ResidencyStats(3, 3 * METADATA, 1, BANK, evictions=2)


def test_what_is_pinned_exceeds_the_bound_until_pins_end() -> None:
    residency = Residency(BANK + METADATA)
    for number, key in enumerate("abc"):
        residency.put(key, compact(number), pinned=True)
    fill(residency, "d")
    assert resident(residency) == {"a", "b", "c"}
    assert residency.stats().evictions == 1
    residency.unpin("b")
    assert resident(residency) == {"a", "c"}
    residency.unpin("a")
    residency.unpin("c")
    assert resident(residency) == {"c"}
    assert residency.stats() == ResidencyStats(1, METADATA, 1, BANK, evictions=3)


def test_banks_count_and_go_with_what_used_them() -> None:
    residency = Residency(2 * BANK + 2 * METADATA)
    residency.put("a", compact(1, bank_seed=1))
    residency.put("b", compact(2, bank_seed=2))
    residency.put("c", compact(3, bank_seed=3))
    assert resident(residency) == {"b", "c"}
    assert residency.stats() == ResidencyStats(2, 2 * METADATA, 2, 2 * BANK, evictions=1)


def test_a_bound_of_nothing_keeps_what_is_pinned_only() -> None:
    residency = Residency(0)
    fill(residency, "a")
    assert resident(residency) == set()
    residency.put("a", compact(), pinned=True)
    residency.pin("a")
    residency.unpin("a")
    assert resident(residency) == {"a"}
    residency.unpin("a")
    assert residency.stats() == ResidencyStats(0, 0, 0, 0, evictions=2)


def test_what_is_retired_is_not_counted_as_evicted() -> None:
    residency = Residency(BANK + METADATA)
    fill(residency, "a")
    residency.retire("a")
    residency.put("b", compact(), pinned=True)
    residency.retire("b")
    residency.unpin("b")
    assert residency.stats() == ResidencyStats(0, 0, 0, 0)


def test_the_bound_holds_after_many_threads() -> None:
    bound = BANK + 2 * METADATA
    residency = Residency(bound)
    adapters = {key: compact(number) for number, key in enumerate("abcdef")}

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(300):
            key = chance.choice("abcdef")
            residency.put(key, adapters[key], pinned=chance.random() < 0.5)
            try:
                residency.pin(key)
            except KeyError:
                continue
            assert residency.get(key).bank_hash == adapters[key].bank_hash
            residency.unpin(key)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    for key in adapters:
        while residency.pins(key):
            residency.unpin(key)
    stats = residency.stats()
    assert 0 < stats.bytes + stats.bank_bytes <= bound
    assert stats.bytes == stats.adapters * METADATA
