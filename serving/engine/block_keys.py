"""Keys of full cache blocks: one key stands for a tenant, an adapter's content and all tokens up to the block's end.

Keys are 256-bit keyed hashes, under a secret of the process: nobody can make two prompts meet, and equal keys need no
comparison of tokens. Knows no blocks.
"""

from __future__ import annotations

import json
import secrets
from array import array
from collections.abc import Sequence
from hashlib import blake2b

from serving.types import GenerationRequest

KEY_BYTES = 32


class BlockKeys:
    """Makes the keys of one engine's requests, for blocks of `block_size` tokens."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._secret = secrets.token_bytes(KEY_BYTES)

    def extend(self, keys: list[bytes], request: GenerationRequest, tokens: Sequence[int]) -> None:
        """Append to `keys`, those of the first blocks of `tokens`, the keys of the full blocks after them."""
        size = self._block_size
        for start in range(len(keys) * size, len(tokens) - size + 1, size):
            parent = keys[-1] if keys else self._root(request)
            keys.append(self._hash(parent + array("q", tokens[start : start + size]).tobytes()))

    def _root(self, request: GenerationRequest) -> bytes:
        """What no two tenants share, nor two contents of an adapter: a reload under one name never meets old keys."""
        return self._hash(json.dumps([request.tenant, request.revision, request.cache_salt]).encode())

    def _hash(self, data: bytes) -> bytes:
        return blake2b(data, key=self._secret, digest_size=KEY_BYTES).digest()
