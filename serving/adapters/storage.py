"""Storage: the two files of every stored revision, addressed by content hash.

It does not know names or tenants, and does not look into the files.
"""

from __future__ import annotations

import re
from pathlib import Path
from threading import Lock
from typing import Protocol

from serving.adapters.files import remove_folder, remove_partial, sync_folder, write_folder
from vblora.checkpoint import CONFIG_FILE, WEIGHTS_FILE

_CONTENT_HASH = re.compile(r"[0-9a-f]{64}")


class RevisionStorage(Protocol):
    """Where the bytes of revisions lie. Thread-safe; every call may take as long as a disk or a network does.

    Hashes are 64 lower-case hex digits, anything else is a `ValueError`. What the medium refuses is an `OSError`.
    """

    def put(self, content_hash: str, config: bytes, weights: bytes) -> None:
        """Store a content, whole or not at all; one that is already there stays as it is."""

    def get(self, content_hash: str) -> tuple[bytes, bytes]:
        """The bytes of config and weights; `KeyError` if this content is not stored."""

    def delete(self, content_hash: str) -> None:
        """Remove a content, whole or not at all; one that is not stored is ignored."""

    def sizes(self) -> dict[str, int]:
        """Bytes of every stored content by hash."""


class LocalStorage:
    """Revisions in a local folder, `<root>/<content hash>/`: one folder a content, in PEFT's layout."""

    def __init__(self, root: Path) -> None:
        """Create `root` where needed and remove what interrupted writes left there: one server a folder."""
        root.mkdir(parents=True, exist_ok=True)
        remove_partial(root)
        self._root = root
        self._writing = Lock()

    def put(self, content_hash: str, config: bytes, weights: bytes) -> None:
        folder = self._folder(content_hash)
        with self._writing:
            if folder.is_dir():
                sync_folder(self._root)  # the write that made it may have failed at just this
            else:
                write_folder(folder, {CONFIG_FILE: config, WEIGHTS_FILE: weights})

    def get(self, content_hash: str) -> tuple[bytes, bytes]:
        folder = self._folder(content_hash)
        try:
            return (folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes()
        except FileNotFoundError:
            raise KeyError(content_hash) from None

    def delete(self, content_hash: str) -> None:
        folder = self._folder(content_hash)
        with self._writing:
            if folder.is_dir():
                remove_folder(folder)

    def sizes(self) -> dict[str, int]:
        folders = (folder for folder in self._root.iterdir() if _CONTENT_HASH.fullmatch(folder.name))
        return {folder.name: sum(file.stat().st_size for file in folder.iterdir()) for folder in folders}

    def _folder(self, content_hash: str) -> Path:
        if not _CONTENT_HASH.fullmatch(content_hash):
            raise ValueError("a content hash is 64 lower-case hex digits")
        return self._root / content_hash
