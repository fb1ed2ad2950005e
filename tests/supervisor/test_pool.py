"""How many workers, and when a dead one may be replaced."""

from __future__ import annotations

import os
from typing import Any

import pytest

from leanserve.errors import SettingsError
from leanserve.settings import CrashSettings, PoolSettings
from leanserve.supervisor.pool import Restarts, count_auto, count_workers


def restarts(**settings: float) -> Restarts:
    return Restarts(CrashSettings(**settings))  # type: ignore[arg-type]  # numbers by name


def test_a_number_is_that_number() -> None:
    assert count_workers(PoolSettings(workers=7)) == (7, "")
    with pytest.raises(SettingsError, match="257"):
        count_workers(PoolSettings(workers=257))


def test_auto_is_what_fits() -> None:
    number, why = count_workers(PoolSettings(workers="auto"))
    assert 1 <= number <= len(os.sched_getaffinity(0))
    assert why.startswith(f"workers=auto is {number}: {len(os.sched_getaffinity(0))} CPU")
    # Larger than any machine: one starts all the same, and may be killed for want of memory, which is told.
    number, why = count_workers(PoolSettings(workers="auto", worker_memory=1 << 60))
    assert number == 1
    assert "MiB of memory for workers of 1099511627776 MiB" in why


@pytest.mark.parametrize(
    ("facts", "number", "why"),
    [
        ((8, None, None, None), 8, "8 CPUs by affinity"),
        ((1, None, None, None), 1, "1 CPU by affinity"),
        ((8, 2.5, None, None), 3, "8 CPUs by affinity, a quota of 2.5"),
        ((8, 0.2, None, None), 1, "8 CPUs by affinity, a quota of 0.2"),
        ((2, 4.0, None, None), 2, "2 CPUs by affinity, a quota of 4"),
        ((8, 6.0, 16 << 30, 3 << 30), 5, "a quota of 6, 16384 MiB of memory for workers of 3072 MiB"),
        ((8, None, 16 << 30, 1 << 30), 8, "16384 MiB of memory for workers of 1024 MiB"),
        ((8, None, None, 1 << 30), 8, "8 CPUs by affinity"),
        ((8, None, 1 << 30, None), 8, "8 CPUs by affinity"),
        ((1000, None, None, None), 256, "1000 CPUs by affinity"),
    ],
)
def test_auto_is_the_least_of_what_is_known(facts: tuple[Any, ...], number: int, why: str) -> None:
    found, said = count_auto(*facts)
    assert found == number
    assert said.endswith(why)


def test_auto_obeys_the_affinity() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert count_workers(PoolSettings(workers="auto"))[0] == 1
    finally:
        os.sched_setaffinity(0, before)


def test_the_first_crash_is_answered_at_once_and_then_the_waits_grow() -> None:
    it = restarts(restart_limit=100, restart_backoff_max=1.0)
    waits = [it.note_crash(0, now_s=float(number), lived_s=0.5) for number in range(8)]
    assert waits[0] == 0.0
    for wait, expected in zip(waits[1:], [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0], strict=True):
        assert wait is not None
        assert 0.8 * expected <= wait <= 1.2 * expected


def test_slots_wait_for_themselves() -> None:
    it = restarts()
    assert [it.note_crash(slot, 0.0, 1.0) for slot in range(4)] == [0.0] * 4


def test_who_lived_long_is_replaced_at_once() -> None:
    it = restarts(restart_window=10)
    for number in range(50):
        assert it.note_crash(0, number * 11.0, lived_s=10.5) == 0.0


def test_the_budget() -> None:
    it = restarts(restart_limit=3, restart_window=10)
    assert [it.note_crash(slot, 1.0, 1.0) is None for slot in range(4)] == [False, False, False, True]
    again = restarts(restart_limit=3, restart_window=10)
    # Four, but never more than three within ten seconds.
    assert all(again.note_crash(slot, slot * 4.0, 1.0) is not None for slot in range(4))


def test_a_slot_that_never_comes_up_is_given_up_however_slow_it_is() -> None:
    it = restarts(restart_limit=3, restart_window=10)
    assert [it.note_crash(0, number * 8.0, 5.0) is None for number in range(4)] == [False, False, False, True]


def test_a_very_long_row_is_no_overflow() -> None:
    it = restarts(restart_limit=100_000, restart_backoff_max=30.0)
    for number in range(3000):
        wait = it.note_crash(0, number * 30.0, lived_s=1.0)
    assert wait is not None
    assert 24 <= wait <= 36
