"""The blocks of the key/value cache: who holds which, and how many are free. Knows no tensors and no requests."""

from __future__ import annotations


class BlockManager:
    """`num_blocks` blocks of `block_size` tokens, each with a reference count."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def missing(self, table: list[int], num_tokens: int) -> int:
        """How many blocks `table` lacks to hold `num_tokens`."""
        return max(0, -(-num_tokens // self.block_size) - len(table))

    def can_grow(self, table: list[int], num_tokens: int) -> bool:
        """Whether `grow` would succeed."""
        return self.missing(table, num_tokens) <= self.num_free

    def grow(self, table: list[int], num_tokens: int) -> None:
        """Append blocks to `table` until it holds `num_tokens`; `can_grow` must say yes."""
        for _ in range(self.missing(table, num_tokens)):
            block = self._free.pop()
            self._references[block] = 1
            table.append(block)

    def release(self, table: list[int]) -> None:
        """Drop a table's hold on its blocks and empty it."""
        for block in reversed(table):
            self._references[block] -= 1
            if not self._references[block]:
                self._free.append(block)
        table.clear()
