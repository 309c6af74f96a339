from __future__ import annotations

import pytest

from serving.api.lifecycle import Lifecycle


def test_requests_are_counted_whatever_becomes_of_them() -> None:
    lifecycle = Lifecycle()
    with lifecycle.request():
        with pytest.raises(ZeroDivisionError), lifecycle.request():
            lifecycle.in_flight // (lifecycle.in_flight - 2)
        assert lifecycle.in_flight == 1
    assert lifecycle.in_flight == 0


def test_only_what_still_generates_is_ended() -> None:
    lifecycle = Lifecycle()
    ended: list[str] = []
    with lifecycle.generation(lambda: ended.append("first")):
        with lifecycle.generation(lambda: ended.append("second")):
            pass
        lifecycle.end_generations()
    lifecycle.end_generations()
    assert ended == ["first"]
