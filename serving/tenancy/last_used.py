"""When each key was last used: noted in memory, written by a thread, at most once a minute a key.

No request waits for it, and what could not be written is written later. Knows no tenants.
"""

from __future__ import annotations

import logging
import time
from threading import Event, Lock, Thread

from cachetools import TTLCache
from sqlalchemy import Engine, bindparam, update
from sqlalchemy.exc import SQLAlchemyError

from serving.store.tables import keys

EVERY_SECONDS = 60.0
WRITE_SECONDS = 2.0
_KEYS = 65_536
_log = logging.getLogger(__name__)
_UPDATE = update(keys).where(keys.c.id == bindparam("key")).values(last_used=bindparam("used"))


class LastUsed:
    """`note` may be called from any thread; `close` writes what is left."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = Lock()
        self._noted: TTLCache[str, bool] = TTLCache(_KEYS, EVERY_SECONDS)
        self._unwritten: dict[str, int] = {}
        self._closing = Event()
        self._thread: Thread | None = None

    def note(self, key_id: str) -> None:
        """The key is used now. Returns at once."""
        with self._lock:
            if key_id in self._noted:
                return
            self._noted[key_id] = True
            self._unwritten[key_id] = int(time.time())
            if self._thread is None:
                self._thread = Thread(target=self._write_now_and_then, name="last-used", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Write what is not written, and end."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _write_now_and_then(self) -> None:
        while not self._closing.wait(WRITE_SECONDS):
            self._write()
        self._write()

    def _write(self) -> None:
        with self._lock:
            batch, self._unwritten = self._unwritten, {}
        if not batch:
            return
        try:
            with self._engine.begin() as connection:
                connection.execute(_UPDATE, [{"key": key, "used": batch[key]} for key in sorted(batch)])
        except SQLAlchemyError as error:
            _log.warning("the last use of %d keys cannot be written yet: %s", len(batch), type(error).__name__)
            with self._lock:
                self._unwritten = {**batch, **self._unwritten}
