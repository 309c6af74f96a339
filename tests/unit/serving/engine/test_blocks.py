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
