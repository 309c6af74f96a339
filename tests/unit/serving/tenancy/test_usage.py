"""Usage in the registry's table: what was counted is there once, whatever happens to the database."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta

import pytest
from sqlalchemy import Engine, insert, select

from serving.errors import Unavailable
from serving.store.database import open_database
from serving.store.tables import usage
from serving.tenancy.metering import UsageCounts, UsageFilter, UsageKey
from serving.tenancy.usage import SqlUsageLedger

ALL = UsageFilter()
NEVER = 3600.0


def today() -> date:
    return datetime.now(UTC).date()


def stored(engine: Engine) -> dict[tuple[str, str], tuple[int, ...]]:
    with engine.execution_options(readonly=True).begin() as connection:
        return {(row.tenant, row.adapter): tuple(row)[3:] for row in connection.execute(select(usage))}


def test_counts_add_up_in_memory_and_in_the_table(database: Engine) -> None:
    for _ in range(2):
        ledger = SqlUsageLedger(database, NEVER)
        ledger.add("acme", "a@1", UsageCounts(1, 10, 4, 7))
        ledger.add("acme", "a@1", UsageCounts(1, 1, 0, 2))
        ledger.add("acme", "", UsageCounts(1, 5, 0, 5))
        ledger.close()
    assert stored(database) == {("acme", "a@1"): (4, 22, 8, 18), ("acme", ""): (2, 10, 0, 10)}


def test_it_is_written_every_few_seconds(database: Engine) -> None:
    ledger = SqlUsageLedger(database, 0.05)
    ledger.add("acme", "", UsageCounts(1, 1, 1, 1))
    deadline = time.monotonic() + 5
    while not stored(database):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ledger.close()


def test_what_is_told_includes_what_is_not_written_yet(database: Engine) -> None:
    ledger = SqlUsageLedger(database, NEVER)
    ledger.add("acme", "a@1", UsageCounts(1, 10, 4, 7))
    assert ledger.find(ALL, 10) == [(UsageKey(today(), "acme", "a@1"), UsageCounts(1, 10, 4, 7))]
    ledger.close()


def test_filters_and_pages(database: Engine) -> None:
    with database.begin() as connection:
        rows = [
            {"day": day, "tenant": tenant, "adapter": adapter}
            for day in (100, 101, 102)
            for tenant in ("acme", "b")
            for adapter in ("", "x@1")
        ]
        counts = {"requests": 1, "prompt_tokens": 2, "cached_tokens": 3, "generated_tokens": 4}
        connection.execute(insert(usage), [row | counts for row in rows])
    ledger = SqlUsageLedger(database, NEVER)
    day = date(1970, 1, 1) + timedelta(days=101)
    everything = [key for key, _ in ledger.find(ALL, 100)]
    assert everything == sorted(everything)
    assert len(everything) == 12
    pages, after = [], None
    while page := ledger.find(ALL, 5, after):
        after = page[-1][0]
        pages.append([key for key, _ in page])
    assert [len(page) for page in pages] == [5, 5, 2]
    assert [key for page in pages for key in page] == everything
    for wanted, keys in (
        (UsageFilter(tenant="b"), [key for key in everything if key.tenant == "b"]),
        (UsageFilter(adapter=""), [key for key in everything if not key.adapter]),
        (UsageFilter(first=day), [key for key in everything if key.day >= day]),
        (UsageFilter(last=day), [key for key in everything if key.day <= day]),
        (UsageFilter("b", "x@1", day, day), [UsageKey(day, "b", "x@1")]),
        (UsageFilter(tenant="nobody"), []),
    ):
        assert [key for key, _ in ledger.find(wanted, 100)] == keys
    ledger.close()


def test_a_failing_database_loses_nothing_and_holds_nobody_up(
    database: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE usage RENAME TO away")
    ledger = SqlUsageLedger(database, 0.02)
    with caplog.at_level(logging.ERROR):
        for _ in range(20):
            started = time.monotonic()
            ledger.add("acme", "", UsageCounts(1, 1, 1, 1))
            assert time.monotonic() - started < 0.1
            time.sleep(0.01)
        with pytest.raises(Unavailable):
            ledger.find(ALL, 10)
    assert len(caplog.records) == 1, "one line a minute"
    with database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE away RENAME TO usage")
    ledger.close()
    assert stored(database) == {("acme", ""): (20, 20, 20, 20)}


def test_nobody_waits_while_the_database_is_busy(database: Engine) -> None:
    ledger = SqlUsageLedger(database, 0.01)
    with database.begin():  # holds SQLite's lock
        for _ in range(50):
            started = time.monotonic()
            ledger.add("acme", "", UsageCounts(1, 1, 1, 1))
            assert time.monotonic() - started < 0.1
            time.sleep(0.005)
    ledger.close()
    assert stored(database) == {("acme", ""): (50, 50, 50, 50)}


def test_many_threads_and_two_servers_count_everything_once(database_url: str, database: Engine) -> None:
    other = open_database(database_url)
    ledgers = [SqlUsageLedger(database, 0.005), SqlUsageLedger(other, 0.005)]
    reading = threading.Event()

    def count(number: int) -> None:
        for turn in range(300):
            ledgers[number % 2].add(f"t{turn % 3}", f"a{turn % 2}@1", UsageCounts(1, 2, 1, 3))

    def read() -> list[int]:
        """Totals as an operator sees them: they never go down."""
        totals = []
        while not reading.is_set():
            totals.append(sum(counts.requests for _, counts in ledgers[0].find(ALL, 100)))
        return totals

    with ThreadPoolExecutor(9) as pool:
        reader = pool.submit(read)
        list(pool.map(count, range(8)))
        reading.set()
        totals = reader.result()
    for ledger in ledgers:
        ledger.close()
    assert totals == sorted(totals)
    table = stored(database)
    assert len(table) == 6
    assert tuple(map(sum, zip(*table.values(), strict=True))) == (2400, 4800, 2400, 7200)
    other.dispose()
