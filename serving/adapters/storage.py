"""Storage: the two files of every stored revision, addressed by content hash.

It does not know names or tenants, and does not look into the files.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Protocol

from serving.adapters.files import remove_folder, remove_partial, sync_folder, write_folder
from vblora.checkpoint import CONFIG_FILE, WEIGHTS_FILE

_CONTENT_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored content: its bytes, and when it was last put (seconds since the epoch)."""

    bytes: int
    modified: float


class RevisionStorage(Protocol):
    """Where the bytes of revisions lie. Thread-safe; every call may take as long as a disk or a network does.

    Hashes are 64 lower-case hex digits, anything else is a `ValueError`. What the medium refuses is an `OSError`.
    """

    def put(self, content_hash: str, config: bytes, weights: bytes) -> None:
        """Store a content, whole or not at all; one that is already there stays as it is, but counts as new."""

    def get(self, content_hash: str) -> tuple[bytes, bytes]:
        """The bytes of config and weights; `KeyError` if this content is not stored."""

    def delete(self, content_hash: str) -> None:
        """Remove a content, whole or not at all; one that is not stored is ignored."""

    def modified(self, content_hash: str) -> float | None:
        """When a content was last put, None if it is not stored."""

    def sizes(self) -> dict[str, Stored]:
        """Every stored content by hash."""


class LocalStorage:
    """Revisions in a local folder, `<root>/<content hash>/`: one folder a content, in PEFT's layout."""

    def __init__(self, root: Path) -> None:
        """Create `root` where needed and remove what interrupted writes left there. Other servers may use it, but what
        they write while this one starts may fail."""
        root.mkdir(parents=True, exist_ok=True)
        remove_partial(root)
        self._root = root
        self._writing = Lock()

    def put(self, content_hash: str, config: bytes, weights: bytes) -> None:
        folder = self._folder(content_hash)
        with self._writing:
            if self._renew(folder):
                return
            try:
                write_folder(folder, {CONFIG_FILE: config, WEIGHTS_FILE: weights})
            except OSError:
                if not self._renew(folder):  # else another process has put it in the meantime
                    raise

    def _renew(self, folder: Path) -> bool:
        """Let a content that is there count as new; False if it is not there."""
        try:
            os.utime(folder)
        except FileNotFoundError:
            return False
        sync_folder(self._root)  # the write that made it may have failed at just this
        return True

    def get(self, content_hash: str) -> tuple[bytes, bytes]:
        folder = self._folder(content_hash)
        try:
            return (folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes()
        except FileNotFoundError:
            raise KeyError(content_hash) from None

    def delete(self, content_hash: str) -> None:
        folder = self._folder(content_hash)
        with self._writing, suppress(FileNotFoundError):  # also if another process removes it now
            remove_folder(folder)

    def modified(self, content_hash: str) -> float | None:
        stored = _stored(self._folder(content_hash))
        return None if stored is None else stored.modified

    def sizes(self) -> dict[str, Stored]:
        folders = (folder for folder in self._root.iterdir() if _CONTENT_HASH.fullmatch(folder.name))
        found = ((folder.name, _stored(folder)) for folder in folders)
        return {content_hash: stored for content_hash, stored in found if stored is not None}

    def _folder(self, content_hash: str) -> Path:
        if not _CONTENT_HASH.fullmatch(content_hash):
            raise ValueError("a content hash is 64 lower-case hex digits")
        return self._root / content_hash


def _stored(folder: Path) -> Stored | None:
    """None if there is no such folder, or not any more."""
    try:
        size = sum(file.stat().st_size for file in folder.iterdir())
        return Stored(size, folder.stat().st_mtime)
    except FileNotFoundError:
        return None
