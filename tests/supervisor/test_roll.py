"""Replacing workers, with real processes and signals."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import alive, wait_until
from supervised import Supervised

Lab = Callable[..., Supervised]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """`with lab("obey", workers=2) as it:`"""
    return lambda app, **settings: Supervised(app, tmp_path, settings)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_roll_goes_one_by_one_and_the_successor_is_ready_first(lab: Lab, workers: int) -> None:
    with lab("obey", workers=workers) as it:
        it.wait_ready(workers)
        it.send(signal.SIGHUP)
        it.wait_notes("left", workers)
        rows = [line.split() for line in (it.folder / "journal").read_text().splitlines()]
        later = [(row[0], int(row[2])) for row in rows if row[0] in ("ready", "left")][workers:]
        assert later == [step for slot in range(workers) for step in (("ready", slot), ("left", slot))]
        assert {note.event for note in it.notes("order-retire")} == {"order-retire"}
        lanes = [(note.slot, note.generation, note.lane) for note in it.notes("ready")]
        assert sorted(lanes)[:2] == [(0, 0, 0), (0, 1, 1)]
        wait_until(lambda: len(it.pids()) == workers, 3, "the last one's end")  # which is behind its note
        assert it.stop() == 0


def test_a_failed_successor_ends_the_roll(lab: Lab) -> None:
    with lab("fail_later", workers=2) as it:
        it.wait_ready(2)
        before = it.pids()
        it.send(signal.SIGHUP)
        it.wait_log("the old one goes on")
        time.sleep(0.3)
        assert it.pids() == before
        assert len(it.notes("started")) == 3
        it.send(signal.SIGHUP)  # and it can be tried again
        it.wait_log("the old one goes on", 2)
        assert it.stop() == 0
    assert len(it.notes("order-drain")) == 2


def test_a_successor_that_is_dead_when_its_word_is_read(lab: Lab) -> None:
    with lab("ready_and_dead_later", workers=2) as it:
        it.wait_ready(2)
        before = it.pids()
        it.send(signal.SIGHUP)
        it.wait_notes("started", 3)
        it.send(signal.SIGSTOP)
        dead = it.wait_notes("ready", 3)[2].pid
        wait_until(lambda: not alive(dead), 5, "the successor has died")
        it.send(signal.SIGCONT)
        it.wait_log("the old one goes on")
        time.sleep(0.2)
        assert it.pids() == before
        assert it.stop() == 0
    assert len(it.notes("left")) == 2


def test_a_successor_that_dies_beside_its_predecessor_ends_the_roll(lab: Lab) -> None:
    with lab("dead_beside_the_old", workers=3, restart_limit=2) as it:
        it.wait_ready(3)
        it.send(signal.SIGHUP)
        it.wait_log("2 more workers stay as they are")
        assert it.wait_code() == 4
    assert {note.slot for note in it.notes("started") if note.generation} == {0}


def test_a_stop_during_a_roll(lab: Lab) -> None:
    with lab("slow_successor", workers=2) as it:
        it.wait_ready(2)
        it.send(signal.SIGHUP)
        it.wait_notes("started", 3)
        begun = time.monotonic()
        assert it.stop() == 0
        assert time.monotonic() - begun < 4
    assert len(it.notes("order-drain")) == 2


def test_two_rolls_in_a_row(lab: Lab) -> None:
    with lab("obey", workers=2) as it:
        it.wait_ready(2)
        first = it.pids()
        it.send(signal.SIGHUP)
        it.send(signal.SIGHUP)
        wait_until(lambda: len(it.pids()) == 2 and not it.pids() & first, 10, "both are new")
        time.sleep(0.3)
        assert len(it.pids()) == 2
        assert it.stop() == 0


def test_a_roll_while_a_worker_still_boots(lab: Lab) -> None:
    """The one that boots becomes ready beside its successor; it does not send the successor away."""
    with lab("second_starts_late", workers=2) as it:
        it.wait_ready(1)
        it.send(signal.SIGHUP)
        wait_until(lambda: len([n for n in it.notes("ready") if n.generation == 1]) == 2, 10, "all are new")
        it.wait_log("has left", 2)
        assert {note.generation for note in it.notes("left")} == {0}
        assert it.stop() == 0


def test_an_old_worker_that_dies_during_its_replacement(lab: Lab) -> None:
    with lab("late_successor") as it:
        it.wait_ready(1)
        it.send(signal.SIGHUP)
        it.wait_notes("started", 2)
        os.kill(it.notes("ready")[0].pid, signal.SIGKILL)
        it.wait_ready(2)
        assert len(it.notes("started")) == 2
        assert len(it.lines("died")) == 1
        it.send(signal.SIGHUP)  # the roll before has come to its end
        it.wait_ready(3)
        assert it.stop() == 0


def test_a_roll_goes_on_when_an_old_worker_dies(lab: Lab) -> None:
    """Its successor is on the way already: the others have their turn all the same."""
    with lab("late_successor", workers=2) as it:
        it.wait_ready(2)
        it.send(signal.SIGHUP)
        it.wait_notes("started", 3)
        replaced = it.notes("started")[2].slot
        (old,) = (note.pid for note in it.notes("ready") if note.slot == replaced)
        os.kill(old, signal.SIGKILL)
        it.wait_ready(4)
        wait_until(lambda: len(it.pids()) == 2, 10, "the old ones have left")
        assert it.lines("stay as they are") == []
        assert {note.generation for note in it.notes("ready") if note.pid in it.pids()} == {1}
        assert it.stop() == 0


def test_successors_that_die_while_the_old_one_still_leaves(lab: Lab) -> None:
    """The end of the old one does not start a second respawn beside the one that waits for its time."""
    with lab("slow_to_leave_and_dead", restart_backoff_max=60) as it:
        it.wait_ready()
        it.send(signal.SIGHUP)
        wait_until(lambda: [n for n in it.notes("ready") if n.generation == 4], 10, "the fifth is ready")
        time.sleep(0.5)
        assert [note.generation for note in it.notes("started")] == [0, 1, 2, 3, 4]
        assert it.stop() == 0


def test_a_full_worker_gets_one_successor(lab: Lab) -> None:
    with lab("full", workers=2) as it:
        it.wait_ready(4)
        time.sleep(0.6)
        assert len(it.notes("started")) == 4
        assert len(it.pids()) == 2
        assert it.stop() == 0
