"""Who used how many tokens: counted in memory, added to the registry's table every few seconds and at the end.

No request waits for the database, and what cannot be written is kept and tried again. After a kill what was counted
since the last write is lost. Knows neither requests nor HTTP.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from threading import Event, Lock, Thread
from typing import Any

from sqlalchemy import ColumnElement, Engine, Select, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from serving.errors import Unavailable
from serving.store.tables import usage
from serving.tenancy.metering import UsageCounts, UsageFilter, UsageKey

WRITE_SECONDS = 2.0
LOG_SECONDS = 60.0
LAST_TRIES = 5  # to write when the server ends, a second apart
_EPOCH = date(1970, 1, 1)
_COUNTS = ("requests", "prompt_tokens", "cached_tokens", "generated_tokens")
_log = logging.getLogger(__name__)


class SqlUsageLedger:
    """`serving.tenancy.metering.UsageLedger` over the database. Thread-safe. `close` writes what is left."""

    def __init__(self, engine: Engine, every: float = WRITE_SECONDS) -> None:
        self._engine = engine
        self._every = every
        self._lock = Lock()
        self._writing = Lock()
        self._counts: dict[UsageKey, UsageCounts] = {}
        self._log_at = 0.0
        self._closing = Event()
        self._thread = Thread(target=self._write_now_and_then, name="usage", daemon=True)
        self._thread.start()

    def add(self, tenant: str, adapter: str, counts: UsageCounts) -> None:
        key = UsageKey(datetime.now(UTC).date(), tenant, adapter)
        with self._lock:
            self._counts[key] = self._counts.get(key, UsageCounts()) + counts

    def find(
        self, wanted: UsageFilter, limit: int, after: UsageKey | None = None
    ) -> Sequence[tuple[UsageKey, UsageCounts]]:
        query = _query(wanted, after).limit(limit)
        try:
            self.write()
            with self._engine.execution_options(readonly=True).begin() as connection:
                rows = connection.execute(query).all()
        except SQLAlchemyError as error:
            raise Unavailable("the registry cannot be read now") from error
        return [(UsageKey(_date(row[0]), row[1], row[2]), UsageCounts(*row[3:])) for row in rows]

    def write(self) -> None:
        """Add what was counted to the table. Raises `SQLAlchemyError`, having kept it."""
        with self._writing:
            with self._lock:
                batch, self._counts = self._counts, {}
            if not batch:
                return
            try:
                self._add(batch)
            except SQLAlchemyError:
                with self._lock:
                    for key, counts in batch.items():
                        self._counts[key] = self._counts.get(key, UsageCounts()) + counts
                raise

    def close(self) -> None:
        """Write what is left, and end."""
        self._closing.set()
        self._thread.join()
        for _ in range(LAST_TRIES):
            if self._try_to_write():
                return
            time.sleep(1)
        _log.error("usage is lost, the registry cannot be written: %s", dict(self._counts))

    def _write_now_and_then(self) -> None:
        while not self._closing.wait(self._every):
            self._try_to_write()

    def _try_to_write(self) -> bool:
        try:
            self.write()
        except SQLAlchemyError as error:
            now = time.monotonic()
            if now >= self._log_at:
                self._log_at = now + LOG_SECONDS
                _log.error("usage cannot be written and is kept in memory: %s", type(error).__name__)
            return False
        return True

    def _add(self, batch: dict[UsageKey, UsageCounts]) -> None:
        """In one transaction, in one order, so that two servers never wait for each other."""
        insert = (postgresql if self._engine.dialect.name == "postgresql" else sqlite).insert(usage)
        sums = {name: usage.c[name] + insert.excluded[name] for name in _COUNTS}
        statement = insert.on_conflict_do_update(index_elements=list(usage.primary_key), set_=sums)
        rows = [
            {"tenant": key.tenant, "adapter": key.adapter, "day": _number(key.day)}
            | {name: getattr(batch[key], name) for name in _COUNTS}
            for key in sorted(batch)
        ]
        with self._engine.begin() as connection:
            connection.execute(statement, rows)


def _query(wanted: UsageFilter, after: UsageKey | None) -> Select[Any]:
    key = (usage.c.day, usage.c.tenant, usage.c.adapter)
    conditions: list[ColumnElement[bool]] = []
    if wanted.tenant is not None:
        conditions.append(usage.c.tenant == wanted.tenant)
    if wanted.adapter is not None:
        conditions.append(usage.c.adapter == wanted.adapter)
    if wanted.first is not None:
        conditions.append(usage.c.day >= _number(wanted.first))
    if wanted.last is not None:
        conditions.append(usage.c.day <= _number(wanted.last))
    if after is not None:
        conditions.append(tuple_(*key) > (_number(after.day), after.tenant, after.adapter))
    return select(*key, *(usage.c[name] for name in _COUNTS)).where(*conditions).order_by(*key)


def _number(day: date) -> int:
    return (day - _EPOCH).days


def _date(number: int) -> date:
    return _EPOCH + timedelta(days=number)
