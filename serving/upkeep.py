"""What recurs while a server runs, beside its requests and off their event loop. Knows when, not what is done."""

from __future__ import annotations

import asyncio
import logging
import time

from sqlalchemy.exc import SQLAlchemyError

from serving.adapters.catalog import Catalog
from serving.adapters.watched import WatchedFolder
from serving.errors import StorageUnavailable

SWEEP_SECONDS = 3600.0
WATCH_SECONDS = 2.0
WATCH_SHARE = 0.05  # of a core, at most, goes into looking at the watched folder
_log = logging.getLogger(__name__)


async def sweep_hourly(catalog: Catalog) -> None:
    """From the second hour on: at its start the catalog has swept already."""
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        try:
            await asyncio.to_thread(catalog.sweep)
        except (OSError, SQLAlchemyError) as error:
            _log.warning("what interrupted changes left cannot be swept now: %s", error)


async def watch(folder: WatchedFolder) -> None:
    """Poll the folder, less often where that takes long; a failure that goes on is told once."""
    told = ""
    while True:
        began = time.monotonic()
        try:
            await asyncio.to_thread(folder.poll)
            told = ""
        except (OSError, StorageUnavailable, SQLAlchemyError) as error:
            if told != str(error):
                told = str(error)
                _log.warning("the watched folder cannot be followed now: %s", told)
        await asyncio.sleep(max(WATCH_SECONDS, (time.monotonic() - began) / WATCH_SHARE))
