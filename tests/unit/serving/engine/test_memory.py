"""Zeros that take no memory until they are written, and what is committed in the background."""

from __future__ import annotations

import mmap
import weakref
from pathlib import Path

import pytest
import torch

from serving.engine.memory import PIECE_BYTES, commit, lazy_zeros

CPU = torch.device("cpu")
BYTES = 8 * PIECE_BYTES


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_of_the_shape_and_kind_that_was_asked_for(dtype: torch.dtype) -> None:
    zeros = lazy_zeros(3, 5, 7, dtype=dtype, device=CPU)
    assert torch.equal(zeros, torch.zeros(3, 5, 7, dtype=dtype))
    zeros[1, 2] = 4
    assert zeros.sum() == 28
    assert lazy_zeros(0, 5, dtype=dtype, device=CPU).shape == (0, 5)


def test_pages_come_when_they_are_committed_and_keep_what_was_written() -> None:
    before = resident()
    zeros = lazy_zeros(BYTES, dtype=torch.uint8, device=CPU)
    assert resident() - before < BYTES / 4
    zeros[5], zeros[-5] = 7, 9
    commit([zeros]).join(60)
    assert resident() - before > BYTES * 3 / 4
    assert zeros[5] == 7 and zeros[-5] == 9 and zeros.sum() == 16
    del zeros
    assert resident() - before < BYTES / 4, "the memory was not given back"


def test_who_commits_keeps_nothing_that_others_let_go() -> None:
    kept = lazy_zeros(BYTES, dtype=torch.uint8, device=CPU)
    gone = lazy_zeros(BYTES, dtype=torch.uint8, device=CPU)
    seen = weakref.ref(gone)
    thread = commit([kept, gone])
    del gone
    assert seen() is None
    thread.join(60)
    assert not thread.is_alive()
