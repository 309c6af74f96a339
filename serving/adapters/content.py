"""Content: from the bytes of a stranger, a folder or the storage to an adapter that is known to be sound and to fit.

It does not know names, tenants or what is resident.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from serving.adapters.storage.revisions import RevisionStorage
from serving.errors import IncompatibleAdapter, InvalidAdapter, InvalidValue, StorageUnavailable
from vblora.checkpoint import (
    CONFIG_FILE,
    MAX_WEIGHTS_BYTES,
    WEIGHTS_FILE,
    AdapterCheckpoint,
    content_hash,
    read_adapter_bytes,
    read_adapter_tensors,
)
from vblora.compact import CompactAdapter
from vblora.errors import CheckpointError, IncompatibleError, VBLoRAError
from vblora.tensorfile import MAX_JSON_BYTES, read_bytes

Compact = Callable[[AdapterCheckpoint], CompactAdapter]
UPLOAD_AGAIN = "upload the adapter again, with its bank."
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Content:
    """The two files of a checked adapter, their content hash, and what the engine needs of them."""

    content_hash: str
    config: bytes
    weights: bytes
    compact: CompactAdapter

    @property
    def bank_hash(self) -> str:
        return self.compact.bank_hash


def check_content(config: bytes, weights: bytes, compact: Compact, *, uploaded: bool) -> Content:
    """Validate the two files of an adapter.

    Raises `InvalidAdapter` where a file fails a check, `IncompatibleAdapter` where the adapter does not fit. In an
    upload `target_modules` must be a list: a string would be a regular expression, and a stranger's may never end.
    """
    try:
        checkpoint = read_adapter_bytes(config, weights)
        if uploaded and not isinstance(checkpoint.config.target_modules, list):
            raise InvalidAdapter("target_modules of an uploaded adapter must be a list of module names.")
        return Content(content_hash(checkpoint), config, weights, compact(checkpoint))
    except IncompatibleError as error:
        raise IncompatibleAdapter(str(error), param=error.field) from error
    except VBLoRAError as error:
        raise InvalidAdapter(str(error)) from error


def resolve_folder(path: str, roots: Sequence[Path]) -> Path:
    """The folder that `path` means, symbolic links followed; `InvalidValue` unless it lies under one of `roots`.

    The words are the same whatever is wrong, so that nobody learns what lies elsewhere.
    """
    try:
        folder = Path(path).resolve(strict=True)
        allowed = folder.is_dir() and _contained(folder, roots)
    except (OSError, ValueError, RuntimeError):  # nothing there, a NUL in the path, a loop of links
        allowed = False
    if not allowed:
        raise InvalidValue("lora_path must be a folder under one of this server's adapter roots.", param="lora_path")
    return folder


def read_folder(folder: Path, roots: Sequence[Path] | None = None) -> tuple[bytes, bytes]:
    """The bytes of an adapter's config and weights; other files are never opened.

    Raises `InvalidAdapter` for a file that is missing, too large, cannot be read or, with `roots`, lies outside them.
    """
    try:
        config = _read_file(folder / CONFIG_FILE, MAX_JSON_BYTES, roots)
        return config, _read_file(folder / WEIGHTS_FILE, MAX_WEIGHTS_BYTES, roots)
    except CheckpointError as error:
        raise InvalidAdapter(f"{error}; an adapter is {CONFIG_FILE} and {WEIGHTS_FILE}, never a .bin file") from error


def _read_file(path: Path, limit: int, roots: Sequence[Path] | None) -> bytes:
    try:
        outside = roots is not None and not _contained(path.resolve(), roots)
        special = path.exists() and not path.is_file()  # a pipe would never end
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path.name} cannot be read") from error
    if outside or special:
        raise CheckpointError(f"{path.name} is not a regular file of its folder")
    return read_bytes(path, limit)


def _contained(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root.resolve()) for root in roots)


class ContentLoader:
    """Stored content → compact adapter. However many threads ask for one content at a time, it is read once."""

    def __init__(self, storage: RevisionStorage, compact: Compact) -> None:
        self._storage = storage
        self._compact = compact
        self._lock = Lock()
        self._loading: dict[str, Future[CompactAdapter]] = {}

    def load(self, content_hash: str) -> CompactAdapter:
        """Read, check by its hash, and compact.

        Raises `KeyError` if the content or its bank is not stored, `InvalidAdapter` if one is damaged,
        `IncompatibleAdapter` if it does not fit the base model that runs now, `StorageUnavailable` if the storage does
        not answer.
        """
        with self._lock:
            running = self._loading.get(content_hash)
            future = self._loading.setdefault(content_hash, Future())
        if running is None:
            self._run(content_hash, future)
        return future.result()

    def _run(self, content_hash: str, future: Future[CompactAdapter]) -> None:
        try:
            future.set_result(self._read(content_hash))
        except BaseException as error:
            future.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._loading[content_hash]

    def _read(self, content_hash: str) -> CompactAdapter:
        try:
            return self._compact(_read_stored(self._storage, content_hash))
        except IncompatibleError as error:
            raise IncompatibleAdapter(str(error), param=error.field) from error


def _read_stored(storage: RevisionStorage, digest: str) -> AdapterCheckpoint:
    try:
        checkpoint = read_adapter_tensors(*storage.get(digest))
        if content_hash(checkpoint) != digest:
            raise CheckpointError("not the content that it should be")
    except OSError as error:
        raise storage_fails() from error
    except VBLoRAError as error:
        _log.warning("the stored bytes of adapter content %s are damaged: %s", digest, error)
        raise stored_files_are("damaged") from error
    return checkpoint


def stored_files_are(what: str) -> InvalidAdapter:
    """The refusal of an adapter whose stored bytes are damaged or missing."""
    return InvalidAdapter(f"The stored files of this adapter are {what}: {UPLOAD_AGAIN}")


def storage_fails() -> StorageUnavailable:
    """The refusal of whatever needs a storage that does not answer now."""
    return StorageUnavailable("The storage of adapters does not answer: try again.")
