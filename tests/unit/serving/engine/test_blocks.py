from __future__ import annotations

from serving.engine.blocks import BlockManager


def test_grow_takes_just_the_blocks_that_are_missing() -> None:
    blocks = BlockManager(4, 16)
    table: list[int] = []
    blocks.grow(table, 17)
    assert len(table) == 2
    assert blocks.num_free == 2
    blocks.grow(table, 32)
    assert len(table) == 2
    blocks.grow(table, 33)
    assert len(set(table)) == 3


def test_growth_is_refused_beyond_what_is_free() -> None:
    blocks = BlockManager(2, 16)
    first: list[int] = []
    blocks.grow(first, 16)
    assert blocks.can_grow([], 16)
    assert not blocks.can_grow([], 17)
    assert blocks.can_grow(first, 32)


def test_released_blocks_serve_again() -> None:
    blocks = BlockManager(2, 16)
    table: list[int] = []
    blocks.grow(table, 32)
    blocks.release(table)
    assert table == []
    assert blocks.num_free == 2


def kept(blocks: BlockManager, *keys: bytes) -> list[int]:
    """A table of full blocks, kept under `keys`."""
    table: list[int] = []
    blocks.grow(table, blocks.block_size * len(keys))
    for block, key in zip(table, keys, strict=True):
        blocks.keep(block, key)
    return table


def test_kept_blocks_are_shared_up_to_the_first_that_is_missing() -> None:
    blocks = BlockManager(8, 16)
    first = kept(blocks, b"a", b"b")
    table: list[int] = []
    assert blocks.share(table, [b"a", b"b", b"c"]) == 2
    assert table == first
    assert blocks.share([], [b"c", b"a"]) == 0
    assert blocks.num_free == 6
    blocks.release(list(first))
    assert blocks.num_free == 6
    blocks.release(table)
    assert blocks.num_free == 8


def test_what_nobody_holds_is_free_and_shared_until_it_is_needed() -> None:
    blocks = BlockManager(4, 16)
    old, new = kept(blocks, b"a", b"b"), kept(blocks, b"c")
    blocks.release(old)
    blocks.release(new)
    assert blocks.num_free == 4
    table: list[int] = []
    blocks.grow(table, 32)  # the empty one, then the last block of the least recently used
    again: list[int] = []
    assert blocks.share(again, [b"a", b"b"]) == 1
    assert blocks.share(again, [b"c"]) == 1
    assert blocks.num_free == 0
    assert len({*table, *again}) == 4


def test_use_defends_a_block() -> None:
    blocks = BlockManager(2, 16)
    for key in (b"a", b"b"):
        blocks.release(kept(blocks, key))
    table: list[int] = []
    blocks.share(table, [b"a"])
    blocks.release(table)
    blocks.grow(table, 16)
    assert blocks.share([], [b"b"]) == 0
    assert blocks.share([], [b"a"]) == 1


def test_of_two_blocks_with_one_key_one_is_kept() -> None:
    blocks = BlockManager(2, 16)
    first, second = kept(blocks, b"a"), kept(blocks, b"a")
    blocks.release(second)
    table: list[int] = []
    blocks.share(table, [b"a"])
    assert table == first
    blocks.grow(table, 32)
    assert table[1] != first[0]
    assert blocks.share([], [b"a"]) == 1
