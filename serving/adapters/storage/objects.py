"""Objects: bytes by kind and hash, as a folder or a bucket keeps them. It does not know what is in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["contents", "banks"]
KINDS: tuple[Kind, ...] = ("contents", "banks")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored object: its bytes, and when it was last put (seconds since the epoch)."""

    bytes: int
    modified: float


class Objects(Protocol):
    """Where the bytes lie, under keys that `key_of` makes. Thread-safe; every call may take as long as a disk or a
    network does. What the medium refuses is an `OSError`."""

    def put(self, key: str, data: bytes) -> None:
        """Store an object, whole or not at all; it takes the place of one that is there."""

    def get(self, key: str) -> bytes:
        """The bytes of an object; `KeyError` if it is not stored."""

    def delete(self, key: str) -> None:
        """Remove an object; one that is not stored is ignored."""

    def modified(self, key: str) -> float | None:
        """When an object was last put, None if it is not stored."""

    def list(self, kind: Kind) -> dict[str, Stored]:
        """Every stored object of a kind, by hash."""


def is_hash(text: str) -> bool:
    """Whether this is a SHA-256 as it is written here: 64 lower-case hex digits."""
    return bool(_HASH.fullmatch(text))


def key_of(kind: Kind, digest: str) -> str:
    """The key of an object; `ValueError` unless `digest` is a hash: nothing else becomes a path."""
    if not is_hash(digest):
        raise ValueError("a hash is 64 lower-case hex digits")
    return f"{kind}/{digest}"
