"""The storage as the server sees it: contents by content hash, each once, and banks by bank hash, each once.

It does not know names, tenants or the medium.
"""

from __future__ import annotations

from torch import Tensor

from serving.adapters.storage.objects import Kind, Objects, Stored, key_of
from serving.adapters.storage.packing import pack, unpack_bank, unpack_content
from vblora.checkpoint import BANK_KEY


class RevisionStorage:
    """Thread-safe, as its objects are. A hash that is none is a `ValueError`, what the medium refuses an `OSError`."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def put(self, content_hash: str, config: bytes, weights: bytes) -> None:
        """Store the two files of a checked adapter: its bank, then the rest, so that no content is ever without one.

        What is there already is written anew: that repairs it, and takes as long as the first time.
        """
        packed = pack(config, weights)
        self._objects.put(key_of("banks", packed.bank_hash), packed.bank)
        self._objects.put(key_of("contents", content_hash), packed.content)

    def get(self, content_hash: str) -> tuple[bytes, dict[str, Tensor]]:
        """The configuration's file and the tensors of a content, its bank among them.

        `KeyError` if content or bank is not stored; `CheckpointError` for one that is damaged, as far as can be seen
        without checking the content's own hash.
        """
        config, tensors, bank_hash = unpack_content(self._objects.get(key_of("contents", content_hash)))
        return config, {**tensors, BANK_KEY: self.bank(bank_hash)}

    def bank(self, bank_hash: str) -> Tensor:
        """A bank (h, b). `KeyError` if it is not stored, `CheckpointError` if it is damaged."""
        return unpack_bank(self._objects.get(key_of("banks", bank_hash)), bank_hash)

    def holds(self, content_hash: str, bank_hash: str) -> bool:
        """Whether a content and its bank are stored, sound or not."""
        keys = key_of("contents", content_hash), key_of("banks", bank_hash)
        return all(self._objects.modified(key) is not None for key in keys)

    def delete(self, digest: str, kind: Kind = "contents") -> None:
        """Remove a content, or a bank, by its hash; one that is not stored is ignored."""
        self._objects.delete(key_of(kind, digest))

    def sizes(self, kind: Kind = "contents") -> dict[str, Stored]:
        """Every stored content, or bank, by its hash."""
        return self._objects.list(kind)
