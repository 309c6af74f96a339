from __future__ import annotations

import pytest

from serving.tenancy.recent import Recent


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_value_is_forgotten_a_second_after_it_was_asked_for(clock: Clock) -> None:
    recent: Recent[int] = Recent(1.0, clock=clock)
    asked = recent.now()
    clock.time += 0.9  # a slow look-up: what it found is as old as its beginning
    recent.put("a", 1, asked)
    assert recent.get("a") == 1
    clock.time += 0.1
    with pytest.raises(KeyError):
        recent.get("a")


def test_what_was_being_looked_up_when_all_was_cleared_is_not_remembered(clock: Clock) -> None:
    recent: Recent[int] = Recent(1.0, clock=clock)
    recent.put("a", 1, recent.now())
    asked = recent.now()
    clock.time += 0.1
    recent.clear()
    recent.put("b", 2, asked)
    for name in ("a", "b"):
        with pytest.raises(KeyError):
            recent.get(name)
    recent.put("b", 3, recent.now())
    assert recent.get("b") == 3


def test_it_is_bounded(clock: Clock) -> None:
    recent: Recent[int] = Recent(1.0, entries=2, clock=clock)
    for number in range(3):
        recent.put(str(number), number, recent.now())
    with pytest.raises(KeyError):
        recent.get("0")
    assert recent.get("2") == 2
