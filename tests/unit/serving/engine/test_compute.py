"""The thread that computes: where jobs run, what they raise, and how many cores torch uses where."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from serving.engine.compute import ComputeThread


@pytest.fixture(autouse=True)
def two_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def elsewhere() -> int:
    """How many cores torch uses on a thread that starts now."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_jobs_run_in_order_on_one_thread_and_return_their_results() -> None:
    compute = ComputeThread("test")
    seen: list[str] = []
    compute.post(lambda: seen.append("posted"))
    assert compute.call(lambda: (list(seen), threading.current_thread().name)) == (["posted"], "test")
    compute.stop()


def test_a_job_raises_where_it_was_called_and_the_thread_goes_on() -> None:
    compute = ComputeThread("test")
    with pytest.raises(ZeroDivisionError):
        compute.call(lambda: 1 / 0)
    assert compute.call(lambda: 3) == 3
    compute.stop()


def test_torch_has_all_cores_on_it_and_one_elsewhere_until_the_last_stops() -> None:
    one, two = ComputeThread("one"), ComputeThread("two")
    assert [one.call(torch.get_num_threads), two.call(torch.get_num_threads)] == [2, 2]
    assert [torch.get_num_threads(), elsewhere()] == [1, 1]
    one.stop()
    one.stop()
    assert [torch.get_num_threads(), two.call(torch.get_num_threads)] == [1, 2]
    two.stop()
    assert [torch.get_num_threads(), elsewhere()] == [2, 2]
