"""The blocks of the key/value cache: who holds which, and what idle ones still know. Knows no tensors, no requests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockManager:
    """`num_blocks` blocks of `block_size` tokens, each with a reference count.

    A full block may be kept under a key that stands for all tokens up to its end (`block_keys.py`). A block that nobody
    holds keeps its contents until it is needed for others, least recently used first: till then it is free and shared.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._key: list[bytes | None] = [None] * num_blocks
        self._kept: dict[bytes, int] = {}
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # kept and held by nobody, least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._empty) + len(self._idle)

    def missing(self, table: list[int], num_tokens: int) -> int:
        """How many blocks `table` lacks to hold `num_tokens`."""
        return max(0, -(-num_tokens // self.block_size) - len(table))

    def can_grow(self, table: list[int], num_tokens: int) -> bool:
        """Whether `grow` would succeed."""
        return self.missing(table, num_tokens) <= self.num_free

    def grow(self, table: list[int], num_tokens: int) -> None:
        """Append blocks to `table` until it holds `num_tokens`; `can_grow` must say yes."""
        for _ in range(self.missing(table, num_tokens)):
            block = self._empty.pop() if self._empty else self._forget_oldest()
            self._references[block] = 1
            table.append(block)

    def share(self, table: list[int], keys: Sequence[bytes]) -> int:
        """Append the blocks kept under `keys`, up to the first that is not there; returns how many that were."""
        for count, key in enumerate(keys):
            block = self._kept.get(key)
            if block is None:
                return count
            self._idle.pop(block, None)
            self._references[block] += 1
            table.append(block)
        return len(keys)

    def keep(self, block: int, key: bytes) -> None:
        """Let others share a block that is full; of two blocks with one key the first is kept."""
        if self._key[block] is None and key not in self._kept:
            self._key[block] = key
            self._kept[key] = block

    def release(self, table: list[int]) -> None:
        """Drop a table's hold on its blocks and empty it. Of blocks that are kept, the last will be needed first."""
        for block in reversed(table):
            self._references[block] -= 1
            if not self._references[block]:
                if self._key[block] is None:
                    self._empty.append(block)
                else:
                    self._idle[block] = None
        table.clear()

    def _forget_oldest(self) -> int:
        block, _ = self._idle.popitem(last=False)
        key, self._key[block] = self._key[block], None
        assert key is not None
        del self._kept[key]
        return block
