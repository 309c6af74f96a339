from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier, Event

import pytest

from serving.adapters.pin import RevisionPin
from serving.errors import ModelNotFound, RateLimitExceeded
from tests.adapters import ANN, OPERATOR, Site, adapter_files

SEEDS = range(5)


def assert_consistent(site: Site) -> None:
    """Nothing is pinned; memory and disk hold what the catalog names, and nothing else."""
    named = {revision.revision for info in site.catalog.list("ann") for revision in info.revisions}
    hashes = site.storage.sizes()
    assert {content_hash[:16] for content_hash in hashes} == named
    assert all(site.residency.pins(content_hash) == 0 for content_hash in hashes)
    resident = sum(content_hash in site.residency for content_hash in hashes)
    assert site.residency.stats().adapters == resident


def attempt(call: Callable[[], object]) -> bool:
    """Whether the call found what it asked for: others may have deleted it."""
    try:
        call()
    except ModelNotFound:
        return False
    return True


@pytest.mark.parametrize("shared", [False, True])
def test_pinning_adding_and_deleting_one_name_at_a_time(site: Site, shared: bool) -> None:
    site.keep_revisions = 2
    catalog = site.restart()
    caller = OPERATOR if shared else ANN
    written = Event()

    def pin() -> None:
        held = catalog.pin("ann", "x")
        assert site.residency.get(held.content_hash).rank == 2
        held.release()
        held.release()

    def pin_default() -> None:
        held = catalog.pin_default("ann")
        if held is not None:
            assert held.content_hash in site.residency
            held.release()

    def activate_oldest() -> None:
        catalog.activate(caller, "x", catalog.get("ann", "x").revisions[0].revision)

    def write(seed: int) -> int:
        calls: list[Callable[[], object]] = [activate_oldest] * 3
        calls += [partial(catalog.delete, caller, "x"), partial(catalog.set_default, "ann", "x")] * 3
        calls += [partial(catalog.add, caller, "x", *adapter_files(number), shared=shared) for number in SEEDS]
        random.Random(seed).shuffle(calls)
        return sum(map(attempt, calls))

    def read(call: Callable[[], object]) -> int:
        """Successes until the writers are done, and once more: then the adapter and the default are there."""
        done, last = 0, False
        while not last:
            last = written.is_set()
            done += attempt(call)
            time.sleep(0.0005)  # else the readers keep the interpreter to themselves
        return done

    with ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(read, call) for call in (pin, pin, pin, pin_default)]
        try:
            done = [writer.result() for writer in [pool.submit(write, seed) for seed in range(4)]]
            catalog.add(caller, "x", *adapter_files(0), shared=shared)
            catalog.set_default("ann", "x")
        finally:
            written.set()
    assert all(reader.result() for reader in readers)
    assert all(count >= len(SEEDS) for count in done)  # an add never fails, whatever the others do
    assert_consistent(site)
    catalog = site.restart()
    catalog.pin("ann", "x").release()
    assert_consistent(site)


def test_a_cold_start_of_many_readers_and_a_deleter(site: Site) -> None:
    for round_ in range(6):
        site.catalog.add(ANN, "x", *adapter_files(1))
        catalog = site.restart()

        def pin() -> bool:
            try:
                catalog.pin("ann", "x").release()  # noqa: B023
            except ModelNotFound:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            pins = [pool.submit(pin) for _ in range(7)]
            if round_ % 2:
                pool.submit(catalog.delete, ANN, "x").result()
        if not round_ % 2:
            assert all(pin.result() for pin in pins)
        assert_consistent(site)


def test_a_slow_read_stalls_neither_requests_nor_changes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.catalog.add(ANN, "slow", *adapter_files(1))
    slow = site.catalog.pin("ann", "slow").content_hash
    site.catalog.add(ANN, "fast", *adapter_files(2))
    catalog = site.restart()
    reading, go = Event(), Event()
    get = site.storage.get

    def slow_get(content_hash: str) -> tuple[bytes, bytes]:
        if content_hash == slow:
            reading.set()
            assert go.wait(10)
        return get(content_hash)

    monkeypatch.setattr(site.storage, "get", slow_get)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(catalog.pin, "ann", "slow")
        assert reading.wait(10)
        catalog.pin("ann", "fast").release()
        catalog.add(ANN, "new", *adapter_files(3))
        catalog.delete(ANN, "new")
        assert not waiting.done()
        go.set()
        waiting.result(10).release()
    assert_consistent(site)


def test_what_many_miss_is_read_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.memory_bytes = 0
    catalog = site.restart()
    catalog.add(ANN, "x", *adapter_files(1))
    reads, all_wait, get = [], Barrier(8), site.storage.get

    def counted(content_hash: str) -> tuple[bytes, bytes]:
        reads.append(content_hash)
        time.sleep(0.5)  # so that all have missed it by then
        return get(content_hash)

    def pin() -> RevisionPin:
        all_wait.wait(10)
        return catalog.pin("ann", "x")

    monkeypatch.setattr(site.storage, "get", counted)
    with ThreadPoolExecutor(8) as pool:
        pins = [future.result() for future in [pool.submit(pin) for _ in range(8)]]
    assert len(reads) == 1
    assert site.residency.pins(pins[0].content_hash) == 8
    for held in pins:
        held.release()
    assert site.residency.stats().adapters == 0
    catalog.pin("ann", "x").release()
    assert len(reads) == 2


def test_more_pins_than_memory_all_hold(site: Site) -> None:
    """Each reads what the others drove out, while those are read: nobody's goes between its reading and its pin."""
    site.memory_bytes = 1
    catalog = site.restart()
    for number in SEEDS:
        catalog.add(ANN, f"x{number}", *adapter_files(number))

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(40):
            pin = catalog.pin("ann", f"x{chance.choice(SEEDS)}")
            assert site.residency.get(pin.content_hash).rank == 2
            pin.release()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    stats = site.residency.stats()
    assert (stats.adapters, stats.bytes, stats.banks) == (0, 0, 0)
    assert stats.evictions > 40


def test_what_is_deleted_while_it_is_read_is_not_found(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.catalog.add(ANN, "x", *adapter_files(1))
    catalog = site.restart()
    get = site.storage.get

    def get_then_delete(content_hash: str) -> tuple[bytes, bytes]:
        files = get(content_hash)
        catalog.delete(ANN, "x")
        return files

    monkeypatch.setattr(site.storage, "get", get_then_delete)
    with pytest.raises(ModelNotFound):
        catalog.pin("ann", "x")
    assert site.residency.stats().adapters == 0


def test_what_is_replaced_while_it_is_read_gives_the_new_content(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.catalog.add(ANN, "x", *adapter_files(1))
    catalog = site.restart()
    get = site.storage.get

    def get_then_replace(content_hash: str) -> tuple[bytes, bytes]:
        files = get(content_hash)
        catalog.add(ANN, "x", *adapter_files(2))
        return files

    monkeypatch.setattr(site.storage, "get", get_then_replace)
    pin = catalog.pin("ann", "x")
    assert pin.revision == catalog.get("ann", "x").active_revision
    assert site.residency.stats().adapters == 1


def test_uploads_at_a_time_never_hold_more_than_a_bound(site: Site) -> None:
    """Two servers on one registry. Fails where holdings are counted before the transaction that adds to them."""
    other = Site(site.data, url=site.url)
    start = Barrier(6)

    def within(count: int, _: int) -> None:
        if count > 2:
            raise RateLimitExceeded("two adapters", reason="adapters", retry_after=1)

    def upload(number: int) -> bool:
        catalog = (site, other)[number % 2].catalog
        start.wait()
        try:
            catalog.add(ANN, f"x{number}", *adapter_files(number), within=within)
        except RateLimitExceeded:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(upload, range(6))) == 2
    other.close()
    assert len(site.catalog.list("ann")) == len(site.storage.sizes()) == 2


def test_only_what_is_new_is_counted_and_a_refusal_leaves_nothing(site: Site) -> None:
    asked: list[tuple[int, int]] = []

    def within(count: int, size: int) -> None:
        asked.append((count, size))
        if count > 1:
            raise RateLimitExceeded("one adapter", reason="adapters", retry_after=1)

    one, two = (sum(map(len, adapter_files(number))) for number in (1, 2))
    for number in (1, 1, 2):  # the second is the first again
        site.catalog.add(ANN, "x", *adapter_files(number), within=within)
    assert asked == [(1, one), (1, one + two)]
    before = site.tables()
    with pytest.raises(RateLimitExceeded):
        site.catalog.add(ANN, "y", *adapter_files(3), within=within)
    assert site.tables() == before
    assert_consistent(site)
    with pytest.raises(RateLimitExceeded):
        site.catalog.add(ANN, "y", *adapter_files(1), within=within)  # content that the tenant has already
    assert asked[-1] == (2, 2 * one + two)
    site.catalog.pin("ann", "x").release()
    assert_consistent(site)
