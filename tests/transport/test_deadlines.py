"""leanserve.transport.deadlines: many deadlines, one timer, nothing kept alive."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import FakeLoop
from leanserve.transport.deadlines import NEVER, Deadlines


class Entry:
    """Notes when its deadline came; sets a new one if told to."""

    def __init__(self, deadlines: Deadlines, again: list[float] | None = None) -> None:
        self.deadlines = deadlines
        self.deadline = NEVER
        self.queue_item: list[Any] | None = None
        self.fired: list[float] = []
        self.again = again or []

    def deadline_reached(self) -> None:
        assert self.deadline == NEVER
        self.fired.append(self.deadlines.now())
        if self.again:
            self.deadlines.set(self, self.again.pop(0))


def made() -> tuple[FakeLoop, Deadlines]:
    loop = FakeLoop()
    return loop, Deadlines(loop.time, loop.call_at)


def test_it_fires_once_and_not_early() -> None:
    loop, deadlines = made()
    entry = Entry(deadlines)
    deadlines.set(entry, 5)
    loop.pass_time(4.99)
    assert entry.fired == []
    loop.pass_time(10)
    assert entry.fired == [1005]
    assert len(deadlines) == 0
    assert loop.armed == 0


def test_moving_it_forward_arms_nothing() -> None:
    loop, deadlines = made()
    entry = Entry(deadlines)
    deadlines.set(entry, 5)
    for _ in range(1000):
        deadlines.set(entry, 5)
    assert (loop.armed, len(deadlines)) == (1, 1)
    loop.pass_time(3)
    deadlines.set(entry, 5)
    loop.pass_time(4.9)
    assert entry.fired == []
    loop.pass_time(0.2)
    assert entry.fired == [1008]


def test_moving_it_back() -> None:
    loop, deadlines = made()
    entry = Entry(deadlines)
    deadlines.set(entry, 50)
    deadlines.set(entry, 5)
    loop.pass_time(100)
    assert entry.fired == [1005]


def test_taking_it_away_by_hand() -> None:
    """A connection writes NEVER and leaves its entry where it is."""
    loop, deadlines = made()
    entry = Entry(deadlines)
    deadlines.set(entry, 5)
    entry.deadline = NEVER
    loop.pass_time(100)
    assert entry.fired == []
    deadlines.set(entry, 5)
    loop.pass_time(5)
    assert entry.fired == [1105]


def test_forgotten_entries_do_not_fire_and_are_not_kept() -> None:
    loop, deadlines = made()
    refs = []
    gc.disable()
    try:
        for number in range(500):
            entry = Entry(deadlines)
            deadlines.set(entry, 10 + number % 7)
            refs.append(weakref.ref(entry))
            deadlines.forget(entry)
            del entry
        assert [ref() for ref in refs if ref() is not None] == []
    finally:
        gc.enable()
    assert len(deadlines) == 0
    assert len(deadlines._heap) <= 130
    loop.pass_time(100)
    assert len(deadlines._heap) == 0


def test_deadlines_of_zero_come_to_an_end() -> None:
    loop, deadlines = made()
    entry = Entry(deadlines, [0, 0, 0])
    deadlines.set(entry, 0)
    loop.pass_time(0)
    assert len(entry.fired) == 4


def test_forgetting_another_entry_from_a_deadline() -> None:
    loop, deadlines = made()
    victim = Entry(deadlines)

    class Killer(Entry):
        def deadline_reached(self) -> None:
            self.deadlines.forget(victim)

    killer = Killer(deadlines)
    deadlines.set(killer, 5)
    deadlines.set(victim, 5)
    loop.pass_time(10)
    assert victim.fired == []
    assert len(deadlines) == 0


def test_close() -> None:
    loop, deadlines = made()
    entries = [Entry(deadlines) for _ in range(3)]
    for entry in entries:
        deadlines.set(entry, 5)
    deadlines.forget(entries[0])
    deadlines.close()
    assert len(deadlines) == 0
    loop.pass_time(10)
    assert [entry.fired for entry in entries] == [[], [], []]
    deadlines.set(entries[1], 5)  # who still has a deadline behind the end gets it
    loop.pass_time(10)
    assert entries[1].fired == [1015]
    assert len(deadlines) == 0


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from(["set", "forget", "never", "pass"]), st.integers(0, 20)),
        max_size=60,
    )
)
def test_as_a_timer_per_entry_would(steps: list[tuple[int, str, int]]) -> None:
    loop, deadlines = made()
    entries = [Entry(deadlines) for _ in range(5)]
    due: list[float | None] = [None] * 5
    fired: list[list[float]] = [[] for _ in range(5)]
    for number, what, size in steps:
        if what == "set":
            deadlines.set(entries[number], size)
            due[number] = loop.time() + size
        elif what == "forget":
            deadlines.forget(entries[number])
            due[number] = None
        elif what == "never":
            entries[number].deadline = NEVER
            due[number] = None
        else:
            loop.pass_time(size)
            for index, when in enumerate(due):
                if when is not None and when <= loop.time():
                    fired[index].append(when)
                    due[index] = None
    assert [entry.fired for entry in entries] == fired
    assert len(deadlines._heap) <= 5 + 64 + len(steps)
    assert loop.armed <= 1


def test_a_fault_of_one_does_not_stop_the_time_of_the_others() -> None:
    loop, deadlines = made()

    class Fails(Entry):
        def deadline_reached(self) -> None:
            raise LookupError("a fault")

    others = [Entry(deadlines) for _ in range(4)]
    for entry, seconds in zip([others[0], Fails(deadlines), *others[1:]], (5, 5, 5, 6, 60), strict=True):
        deadlines.set(entry, seconds)
    with pytest.raises(LookupError):
        loop.pass_time(100)
    loop.pass_time(100)
    assert [len(entry.fired) for entry in others] == [1, 1, 1, 1]
    assert len(deadlines) == 0
