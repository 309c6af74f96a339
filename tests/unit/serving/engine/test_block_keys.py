from __future__ import annotations

from dataclasses import replace

import pytest

from serving.engine.block_keys import BlockKeys
from serving.types import GenerationRequest, SamplingParams

SIZE = 4
REQUEST = GenerationRequest("r", "ann", (1, 2), SamplingParams(max_tokens=1), "revision", "salt")


def keys_of(keys: BlockKeys, request: GenerationRequest, tokens: list[int]) -> list[bytes]:
    found: list[bytes] = []
    keys.extend(found, request, tokens)
    return found


def test_there_is_a_key_for_every_full_block() -> None:
    keys = BlockKeys(SIZE)
    assert [len(keys_of(keys, REQUEST, list(range(n)))) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_keys_grow_with_the_tokens_and_are_the_same_whenever_they_are_made() -> None:
    keys = BlockKeys(SIZE)
    grown: list[bytes] = []
    for length in range(20):
        keys.extend(grown, REQUEST, list(range(length)))
    assert grown == keys_of(keys, REQUEST, list(range(19)))
    assert len(set(grown)) == 4


def test_a_key_stands_for_all_tokens_before() -> None:
    keys = BlockKeys(SIZE)
    one, other = keys_of(keys, REQUEST, [1, 2, 3, 4, 5, 6, 7, 8]), keys_of(keys, REQUEST, [0, 2, 3, 4, 5, 6, 7, 8])
    assert not {*one} & {*other}


@pytest.mark.parametrize(
    "other",
    [
        replace(REQUEST, tenant="bob"),
        replace(REQUEST, revision="other"),
        replace(REQUEST, revision=None),
        replace(REQUEST, cache_salt="other"),
        replace(REQUEST, cache_salt=None),
    ],
)
def test_no_key_is_shared_beyond_tenant_revision_and_salt(other: GenerationRequest) -> None:
    keys = BlockKeys(SIZE)
    tokens = list(range(8))
    assert not {*keys_of(keys, REQUEST, tokens)} & {*keys_of(keys, other, tokens)}


def test_keys_of_two_processes_differ() -> None:
    tokens = list(range(4))
    assert keys_of(BlockKeys(SIZE), REQUEST, tokens) != keys_of(BlockKeys(SIZE), REQUEST, tokens)
