"""Safetensors bytes ↔ named tensors, with the checks that a stranger's file needs. Knows nothing of adapters."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from vblora.errors import CheckpointError

MAX_JSON_BYTES = 1 << 20
MAX_HEADER_BYTES = 4 << 20
MAX_FILE_BYTES = 4 << 30
MAX_TENSORS = 20_000
FLOAT_DTYPES = frozenset({"F32", "F16", "BF16"})
INDEX_DTYPES = frozenset({"U8", "I16", "I32", "I64"})
_LENGTH_BYTES = 8


def read_bytes(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """All bytes of a file. Raises `CheckpointError`, without the folder, if it is missing, unreadable or too large."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read") from error
    if len(data) > limit:
        raise CheckpointError(f"{path.name} is larger than {limit} bytes")
    return data


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, meets the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object in UTF-8. Raises `CheckpointError` for anything else, a repeated key included."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            repeated = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise CheckpointError(f"{what}: the key {repeated!r} appears twice")
        return values

    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: not valid JSON") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{what}: must be a JSON object")
    return values


def load_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file, copied out of it.

    Raises `CheckpointError` for a header that is too large, malformed or repeats a name, too many tensors, a dtype
    other than float32, float16, bfloat16 and integers, a truncated file, and data that overlaps or is left over.
    """
    _check_header(data)
    try:
        return load(data)
    except (SafetensorError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"not a sound safetensors file: {error}") from error


def _check_header(data: bytes) -> None:
    """What the safetensors library does not refuse, found before anything is allocated."""
    if len(data) < _LENGTH_BYTES:
        raise CheckpointError("not a sound safetensors file: it is empty or truncated")
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"safetensors header: larger than {MAX_HEADER_BYTES} bytes")
    if length > len(data) - _LENGTH_BYTES:
        raise CheckpointError("not a sound safetensors file: it is truncated")
    header = parse_json(data[_LENGTH_BYTES : _LENGTH_BYTES + length], "safetensors header")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(f"safetensors header: {len(entries)} tensors, more than {MAX_TENSORS}")
    for name, entry in entries.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if not isinstance(dtype, str) or dtype not in FLOAT_DTYPES | INDEX_DTYPES:
            raise CheckpointError(f"{name}: dtype {dtype!r} is not allowed")
