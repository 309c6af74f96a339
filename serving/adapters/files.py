"""Durable writes: after a crash at any moment a file or folder is the old one or the new one, never half of either.

It does not know what the bytes mean.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

PARTIAL_PREFIX = ".partial-"


def write_file(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data`. If this raises, the file is the old one or, once replaced, the new one."""
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL_PREFIX)
    try:
        _write_and_sync(descriptor, data)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Create the folder `path` holding `files` by name; it must not exist yet, its parent must."""
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=PARTIAL_PREFIX))
    try:
        for name, data in files.items():
            _write_and_sync(partial / name, data)
        sync_folder(partial)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it; `FileNotFoundError` if there is none. It vanishes in one piece."""
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=PARTIAL_PREFIX))
    try:
        os.replace(path, partial)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Remove what interrupted writes left in `folder`. Nobody may be writing there."""
    for partial in folder.glob(f"{PARTIAL_PREFIX}*"):
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial)
        else:
            partial.unlink()


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_and_sync(target: Path | int, data: bytes) -> None:
    with open(target, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
