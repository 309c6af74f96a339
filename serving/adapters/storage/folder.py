"""A storage in a local folder, and what an earlier version kept there: `<content hash>/` with an adapter's two files.

It does not know who uses it.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from serving.adapters.files import remove_folder
from serving.adapters.storage.local import LocalObjects
from serving.adapters.storage.objects import is_hash
from serving.adapters.storage.revisions import RevisionStorage
from vblora.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from vblora.errors import CheckpointError

_log = logging.getLogger(__name__)


def open_folder(root: Path) -> RevisionStorage:
    """The storage in `root`, which is created where needed. What an earlier version kept there is brought into the
    order of this one: a crash in between leaves it in either, or in both. Raises `OSError`."""
    storage = RevisionStorage(LocalObjects(root))
    for folder in [entry for entry in root.iterdir() if is_hash(entry.name)]:
        _convert(folder, storage)
    return storage


def _convert(folder: Path, storage: RevisionStorage) -> None:
    with suppress(FileNotFoundError):  # another server does the same
        try:
            storage.put(folder.name, (folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes())
        except CheckpointError as error:
            _log.warning("adapter content %s is damaged and stays as it is: %s", folder.name, error)
        else:
            remove_folder(folder)
