"""Sliding windows, in memory and in a real Redis; and what is done while that is away."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.tenancy.windows import RETRY_SECONDS, TIMEOUT_SECONDS, Window, Windows, WindowsError
from tests import redis

SECONDS = 2
Made = Callable[[], Windows]


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.redis)])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Made]:
    """Makes windows of two seconds, over one storage in Redis."""
    if request.param == "memory":
        yield lambda: Windows(seconds=SECONDS)
        return
    with redis.running(tmp_path) as url:
        yield lambda: Windows(url, seconds=SECONDS)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def begin_a_window() -> None:
    """The windows in memory begin at multiples of their length: leave a test most of one."""
    time.sleep(SECONDS - time.time() % SECONDS + 0.02)


def test_what_is_over_the_limit_is_refused_and_takes_nothing(make: Made) -> None:
    windows = make()
    begin_a_window()
    assert windows.take("a", 10, 6)
    assert windows.take("a", 10, 5) is None
    assert windows.read("a").taken == 6
    assert windows.take("a", 10, 4)
    assert windows.take("a", 10, 1) is None
    assert windows.take("b", 10, 10), "another name"
    windows.close()


def test_what_was_taken_fades_and_when_is_told(make: Made) -> None:
    windows = make()
    begin_a_window()
    assert windows.take("a", 10, 10)
    seconds = windows.read("a").until(10, 5)
    assert SECONDS < seconds <= 1.5 * SECONDS + 0.1
    time.sleep(seconds - 0.3)
    assert windows.take("a", 10, 5) is None
    time.sleep(0.35)
    assert windows.take("a", 10, 5)
    assert windows.read("a").until(10, 5) > 0
    time.sleep(windows.read("a").until_empty + 0.05)
    assert (windows.read("a").taken, windows.read("a").until_empty) == (0, 0.0)
    windows.close()


def test_what_is_given_back_can_be_taken_again(make: Made) -> None:
    windows = make()
    begin_a_window()
    charge = windows.take("a", 10, 8)
    assert charge
    windows.give_back(charge, 6)
    wait_for(lambda: windows.read("a").taken == 2)
    assert windows.take("a", 10, 8)
    windows.close()


def test_what_is_given_back_later_counts_in_the_minute_that_is_then(make: Made) -> None:
    windows = make()
    begin_a_window()
    charge = windows.take("a", 10, 10)
    assert charge
    time.sleep(windows.read("a").current_seconds - SECONDS + 0.2)  # the window after
    windows.give_back(charge, 10)
    wait_for(lambda: windows.read("a").taken == 0)
    assert windows.take("a", 10, 10)
    time.sleep(windows.read("a").until_empty + 0.05)
    assert windows.read("a").taken == 0
    windows.close()


@pytest.mark.redis
def test_servers_share_what_is_in_one_redis(tmp_path: Path) -> None:
    with redis.running(tmp_path) as url:
        one, other = Windows(url), Windows(url)
        assert one.take("a", 10, 7)
        assert other.take("a", 10, 4) is None
        assert other.read("a").taken == 7
        one.close()
        other.close()


@pytest.mark.redis
def test_closing_gives_back_what_was_to_be_given_back(tmp_path: Path) -> None:
    with redis.running(tmp_path) as url:
        windows = Windows(url)
        charges = [windows.take("a", 100, 1) for _ in range(50)]
        for charge in charges:
            assert charge
            windows.give_back(charge, 1)
        windows.close()
        assert Windows(url).read("a").taken == 0


@pytest.mark.redis
def test_without_redis_requests_go_on_by_memory_until_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failures: list[None] = []
    port = redis.free_port()
    with redis.running(tmp_path, port) as url:
        windows = Windows(url, failed=lambda: failures.append(None))
        held = windows.take("a", 3, 3)
        assert held and windows.take("a", 3, 1) is None
    with caplog.at_level(logging.ERROR):
        assert windows.take("a", 3, 3), "memory has not seen what was taken before"
        assert windows.take("a", 3, 1) is None
        assert len(failures) == 1, "it is asked again after a while only"
        windows.give_back(held, 3)
        wait_for(lambda: len(failures) == 2)
        time.sleep(RETRY_SECONDS + 0.1)
        windows.read("a")
        assert len(failures) == 3
    assert len(caplog.records) == 1, "one line a minute"
    with redis.running(tmp_path, port):
        time.sleep(RETRY_SECONDS + 0.1)
        assert windows.read("a").taken == 0, "the new Redis's"
        assert len(failures) == 3
        windows.close()


@pytest.mark.redis
def test_a_redis_that_never_answers_holds_nobody_up_for_long() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        windows = Windows(f"redis://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert windows.take("a", 1, 1)
        assert time.monotonic() - started < 3 * TIMEOUT_SECONDS
        started = time.monotonic()
        assert windows.take("a", 1, 1) is None
        assert time.monotonic() - started < TIMEOUT_SECONDS / 2
        windows.close()


@pytest.mark.parametrize("url", ["nonsense", "http://127.0.0.1", "redis://127.0.0.1:port"])
def test_a_wrong_address_is_told_of(url: str) -> None:
    with pytest.raises(WindowsError, match="address"):
        Windows(url)


@given(
    previous=st.integers(-50, 100),
    current=st.integers(-50, 100),
    into=st.floats(0, 59.9),
    limit=st.integers(1, 100),
    data=st.data(),
)
def test_after_the_time_told_the_cost_fits_and_well_before_it_does_not(
    previous: int, current: int, into: float, limit: int, data: st.DataObject
) -> None:
    cost = data.draw(st.integers(1, limit))
    window = Window(previous, 60 - into if previous else 0.0, current, 120 - into if current else 0.0)
    seconds = window.until(limit, cost)
    assert 0 <= seconds <= 120
    assert after(window, seconds).taken + cost <= limit
    if seconds > 2:
        weighted = after(window, seconds - 1)
        assert weighted.previous * weighted.previous_seconds / 60 + weighted.current + cost > limit


def after(window: Window, seconds: float) -> Window:
    """The same window so much later, if nothing is taken."""
    fading = max(0.0, window.current_seconds - 60)
    if seconds < fading or not window.current:
        left = max(0.0, window.previous_seconds - seconds)
        return Window(window.previous, left, window.current, window.current_seconds - seconds)
    return Window(window.current, max(0.0, 60 - (seconds - fading)), 0, 0.0)
