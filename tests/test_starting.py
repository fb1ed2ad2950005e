"""leanserve.starting: what an application may say while it starts."""

from __future__ import annotations

from math import inf, nan

import pytest

import leanserve
from leanserve.starting import extend_start, tell_with


def test_without_a_supervisor_nobody_is_told() -> None:
    leanserve.extend_start(5)


def test_seconds_are_passed_on() -> None:
    told: list[float] = []
    tell_with(told.append)
    try:
        extend_start(5)
        extend_start(0.25)
    finally:
        tell_with(None)
    extend_start(7)
    assert told == [5.0, 0.25]


@pytest.mark.parametrize("seconds", [0, -1, inf, nan])
def test_what_is_no_time(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds above 0"):
        extend_start(seconds)
