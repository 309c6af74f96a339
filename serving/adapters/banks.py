"""Uploads without a bank: which stored bank a tenant may name in its place. It does not know where banks are kept."""

from __future__ import annotations

from torch import Tensor

from serving.adapters.content import UPLOAD_AGAIN, storage_fails
from serving.adapters.registry import Registry
from serving.adapters.storage.objects import is_hash
from serving.adapters.storage.packing import join_bank
from serving.adapters.storage.revisions import RevisionStorage
from serving.errors import InvalidAdapter, InvalidValue
from vblora.errors import CheckpointError

_ALGORITHM = "sha256:"


class Banks:
    """The stored banks, as tenants may see them."""

    def __init__(self, registry: Registry, storage: RevisionStorage) -> None:
        self._registry = registry
        self._storage = storage

    def complete(self, tenant: str, weights: bytes, bank: str) -> bytes:
        """The weights' file as it would be with `bank`, ``sha256:`` and a hash.

        The bank must be that of an adapter of the tenant's, or of a shared one. For every other, whether somebody has
        it or nobody, the question to the registry and the words are the same, and no bytes are read. Raises
        `InvalidValue`, `InvalidAdapter` and `StorageUnavailable`, the first two with param ``bank``.
        """
        digest = bank.removeprefix(_ALGORITHM)
        if digest == bank or not is_hash(digest):
            raise InvalidValue(f"bank: write {_ALGORITHM} and 64 lower-case hex digits", param="bank")
        if not self._registry.may_use_bank(tenant, digest):
            raise InvalidAdapter("No adapter of yours and no shared one is on a bank with this hash.", param="bank")
        tensor = self._read(digest)
        try:
            return join_bank(weights, tensor)
        except CheckpointError as error:
            raise InvalidAdapter(str(error), param="bank") from error

    def _read(self, digest: str) -> Tensor:
        try:
            return self._storage.bank(digest)
        except OSError as error:
            raise storage_fails() from error
        except (KeyError, CheckpointError) as error:
            what = "missing" if isinstance(error, KeyError) else "damaged"
            message = f"The stored files of this bank are {what}: {UPLOAD_AGAIN}"
            raise InvalidAdapter(message, param="bank") from error
