"""Objects as files of a local folder: `<root>/contents/<hash>` and `<root>/banks/<hash>`. Knows no network."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from serving.adapters.files import remove_partial, sync_folder, write_file
from serving.adapters.storage.objects import KINDS, Kind, Stored, is_hash


class LocalObjects:
    """`Objects` in a folder."""

    def __init__(self, root: Path) -> None:
        """Create `root` where needed and remove what interrupted writes left there. Other servers may use it, but what
        they write while this one starts may fail."""
        for folder in (root, *(root / kind for kind in KINDS)):
            folder.mkdir(parents=True, exist_ok=True)
            remove_partial(folder)
        self._root = root

    def put(self, key: str, data: bytes) -> None:
        write_file(self._root / key, data)

    def get(self, key: str) -> bytes:
        try:
            return (self._root / key).read_bytes()
        except FileNotFoundError:
            raise KeyError(key) from None

    def delete(self, key: str) -> None:
        path = self._root / key
        with suppress(FileNotFoundError):
            path.unlink()
            sync_folder(path.parent)

    def modified(self, key: str) -> float | None:
        try:
            return (self._root / key).stat().st_mtime
        except FileNotFoundError:
            return None

    def list(self, kind: Kind) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        with os.scandir(self._root / kind) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # removed by another process
                    if is_hash(entry.name):
                        found[entry.name] = Stored(entry.stat().st_size, entry.stat().st_mtime)
        return found
