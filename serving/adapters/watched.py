"""The watched folder: each folder in it that holds an adapter's two files declares a shared adapter of its name.

It does not know the registry, nor when it is told to look.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from serving.adapters.content import read_folder
from serving.adapters.declarations import Declarations
from serving.errors import ServingError, StorageUnavailable
from vblora.checkpoint import CONFIG_FILE, WEIGHTS_FILE

_log = logging.getLogger(__name__)

Stamp = tuple[tuple[int, int, int] | None, ...]
"""Of both files inode, size and time of change, which unlike that of modification nobody can set; None for no file."""


class _ChangingError(Exception):
    """The files changed while they were read."""


@dataclass(slots=True)
class _Seen:
    stamp: Stamp
    done: bool = False


class WatchedFolder:
    """`poll` looks once, and acts on what is as it was when it looked last: nothing is taken half written, nor removed
    while it is being replaced. A folder that cannot be taken is logged once, and tried again when its files change."""

    def __init__(self, root: Path, declared: Declarations) -> None:
        self._root = root
        self._declared = declared
        self._seen: dict[str, _Seen] = {}
        self._missing: set[str] = set()
        self._closed = Event()

    def poll(self) -> None:
        """Raises `OSError`, `StorageUnavailable` and SQLAlchemy's errors; a later poll does what could not be done."""
        with os.scandir(self._root) as entries:
            stamps = {entry.name: self._stamp(entry.name) for entry in entries if _is_folder(entry)}
        before, self._seen = self._seen, {name: _Seen(stamp) for name, stamp in stamps.items()}
        same = [name for name in stamps if name in before and before[name].stamp == stamps[name]]
        for name in same:
            self._seen[name] = before[name]
        self._remove(self._declared.watched() - stamps.keys())
        for name in same:
            if not self._seen[name].done and not self._closed.is_set():
                self._take(name, self._seen[name])

    def close(self) -> None:
        """Let a poll that runs end after the adapter it is at."""
        self._closed.set()

    def _remove(self, missing: set[str]) -> None:
        for name in missing & self._missing:
            self._declared.unwatch(name)
            _log.info("adapter %s removed: its folder is gone", name)
        self._missing = missing

    def _take(self, name: str, seen: _Seen) -> None:
        try:
            if self._declared.watch(name, lambda: self._read(name, seen.stamp)):
                _log.info("adapter %s taken from its folder", name)
        except _ChangingError:
            return
        except StorageUnavailable:
            raise
        except ServingError as error:
            _log.warning("folder %r is not taken until it changes: %s", name, error.message)
        seen.done = True

    def _read(self, name: str, stamp: Stamp) -> tuple[bytes, bytes]:
        files = read_folder(self._root / name, [self._root])
        if self._stamp(name) != stamp:
            raise _ChangingError
        return files

    def _stamp(self, name: str) -> Stamp:
        return tuple(_stamp(self._root / name / file) for file in (CONFIG_FILE, WEIGHTS_FILE))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Also one that cannot be looked into: it is not gone."""
    try:
        return entry.is_dir()
    except OSError:
        return True


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_ctime_ns
