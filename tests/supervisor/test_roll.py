"""Replacing workers, with real processes and signals."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import alive, wait_until
from leanserve.admin.client import Client
from supervised import Supervised

Lab = Callable[..., Supervised]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """`with lab("obey", workers=2) as it:`"""
    return lambda app, **settings: Supervised(app, tmp_path, settings)


def steps(it: Supervised, *events: str) -> list[tuple[str, int, int]]:
    """What the stand-ins did, in order: event, slot, generation."""
    rows = [line.split() for line in (it.folder / "journal").read_text().splitlines()]
    return [(row[0], int(row[2]), int(row[3])) for row in rows if row[0] in events]


def most_at_once(it: Supervised) -> int:
    """The largest number of workers that lived together, as the supervisor's log has it."""
    living = most = 0
    for line in it.log.splitlines():
        if " started" in line and "worker " in line and "admin" not in line:
            living += 1
        elif " has left" in line or " died: " in line:
            living -= 1
        most = max(most, living)
    return most


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
        it.wait_notes("listens", 3)
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


# More than one at a time


def test_as_many_at_a_time_as_may_be(lab: Lab) -> None:
    with lab("late_successor", workers=5, max_surge=2) as it:
        it.wait_ready(5)
        it.send(signal.SIGHUP)
        it.wait_notes("left", 5, 20)
        it.wait_log("has left", 5)
        assert most_at_once(it) == 7
        begins = [slot for event, slot, generation in steps(it, "started") if generation]
        assert sorted(begins) == [0, 1, 2, 3, 4]
        assert it.stop() == 0


def test_of_two_successors_one_fails(lab: Lab) -> None:
    """The other one is finished, and nothing new is begun."""
    with lab("fail_later", workers=4, max_surge=2) as it:
        it.wait_ready(4)
        before = it.pids()
        it.send(signal.SIGHUP)
        it.wait_log("the old one goes on", 2)
        it.wait_log("2 more workers stay as they are")
        assert it.pids() == before
        assert len(it.notes("started")) == 6
        assert it.stop() == 0


# Stop first


@pytest.mark.parametrize("workers", [1, 3])
def test_stop_first(lab: Lab, workers: int) -> None:
    with lab("late_successor", workers=workers, roll_strategy="stop-first", max_surge=3) as it:
        it.wait_ready(workers)
        it.send(signal.SIGHUP)
        it.wait_ready(2 * workers)
        done = steps(it, "order-retire", "left", "started", "ready")[2 * workers :]
        names = ("order-retire", "left", "started", "ready")
        assert done == [
            (name, slot, names.index(name) // 2) for slot in range(workers) for name in names
        ]
        assert most_at_once(it) == workers
        it.send(signal.SIGHUP)  # the roll before has come to its end
        it.wait_ready(3 * workers)
        assert it.stop() == 0


def test_the_queue_of_a_slot_waits_for_its_successor(lab: Lab) -> None:
    with lab("late_successor", roll_strategy="stop-first") as it:
        it.wait_ready()
        it.send(signal.SIGHUP)
        it.wait_notes("left", 1)
        for _ in range(20):
            assert socket.create_connection(("127.0.0.1", it.port), 5).close() is None
        assert len(it.notes("ready")) == 1  # they were taken by nobody but the kernel
        it.wait_ready(2)
        assert it.stop() == 0


def test_stop_first_and_the_successor_fails(lab: Lab) -> None:
    """There is no old one: it is tried again, and the others stay."""
    with lab("fails_twice", workers=2, roll_strategy="stop-first") as it:
        it.wait_ready(2)
        (other,) = (note.pid for note in it.notes("ready") if note.slot == 1)
        it.send(signal.SIGHUP)
        it.wait_log("1 more workers stay as they are")
        it.wait_ready(3)
        assert [generation for _, slot, generation in steps(it, "started") if slot == 0] == [0, 1, 2, 3]
        assert len(it.lines("died: no such model")) == 2
        assert alive(other)
        assert it.stop() == 0


def test_stop_first_gives_up_by_the_restart_budget(lab: Lab) -> None:
    with lab("fail_later", workers=2, roll_strategy="stop-first", restart_limit=3) as it:
        it.wait_ready(2)
        it.send(signal.SIGHUP)
        assert it.wait_code() == 4
    assert len(it.lines("died: no such model")) == 4


def test_a_stop_while_a_slot_is_empty(lab: Lab) -> None:
    with lab("slow_successor", workers=2, roll_strategy="stop-first") as it:
        it.wait_ready(2)
        it.send(signal.SIGHUP)
        it.wait_notes("started", 3)
        assert it.stop() == 0
    assert len(it.notes("order-drain")) == 1


def test_a_full_worker_stops_first_too(lab: Lab) -> None:
    with lab("all_full", workers=2, roll_strategy="stop-first") as it:
        it.wait_ready(4)
        assert most_at_once(it) == 2
        assert it.stop() == 0


# Recycling


def test_full_workers_are_replaced_one_at_a_time(lab: Lab) -> None:
    """However many a reload may have under way: this is nobody's wish that is waited for."""
    with lab("all_full", workers=4, max_surge=4) as it:
        it.wait_ready(8)
        it.wait_log("has left", 4)
        assert most_at_once(it) == 5
        assert len(it.notes("started")) == 8
        assert it.stop() == 0


def test_a_reload_replaces_those_that_wait_as_well(lab: Lab, runtime_directory: Path) -> None:
    with lab("all_full", workers=4, max_surge=4) as it:
        it.wait_ready(4)
        it.wait_notes("full", 4)  # one is being renewed, three wait
        it.send(signal.SIGHUP)
        it.wait_log("replacing all workers")
        client = Client(str(runtime_directory / f"{it.pid}.sock"))
        wait_until(lambda: client.status()["server"]["state"] == "running", 20, "the end of the roll")
        generations = [note.generation for note in it.notes("ready")]
        assert generations.count(1) == 4
        assert generations.count(2) < 4  # those that had been renewed before, and not those that had waited
        assert it.stop() == 0


# The end of a roll before its time


def test_a_stop_does_not_wait_for_a_successor_that_hears_nothing(lab: Lab) -> None:
    with lab("stuck_successor", workers=2, drain_timeout=600) as it:
        it.wait_ready(2)
        it.send(signal.SIGHUP)
        it.wait_notes("started", 3)
        assert it.stop() == 0
    assert len(it.notes("order-drain")) == 2


def order(it: Supervised, folder: Path, name: str) -> str:
    """Give an order; what it did."""
    answer = Client(str(folder / f"{it.pid}.sock")).order(name)
    assert answer["ok"], answer
    text: str = answer["text"]
    return text


def test_abort(lab: Lab, runtime_directory: Path) -> None:
    with lab("slow_second_successor", workers=4) as it:
        it.wait_ready(4)
        assert order(it, runtime_directory, "abort") == "no worker is being replaced"
        old = {note.slot: note.pid for note in it.notes("ready")}
        it.send(signal.SIGHUP)
        it.wait_notes("started", 6)
        hangs = it.notes("started")[5].pid
        assert order(it, runtime_directory, "abort") == "3 workers not replaced"
        assert order(it, runtime_directory, "abort") == "no worker is being replaced"
        wait_until(lambda: not alive(hangs), 10, "the successor has left")
        assert [alive(old[slot]) for slot in range(4)] == [False, True, True, True]
        assert not it.lines("ERROR")
        assert it.stop() == 0
    assert len(it.notes("started")) == 6


def test_abort_and_reload_at_once(lab: Lab, runtime_directory: Path) -> None:
    """No third worker in a slot: the scoreboard has no record for one."""
    with lab("stuck_successor", workers=2) as it:
        it.wait_ready(2)
        it.send(signal.SIGHUP)
        it.wait_notes("started", 3)
        order(it, runtime_directory, "abort")  # and it hears nothing before SIGKILL
        it.send(signal.SIGHUP)
        started = it.wait_notes("started", 4)
        assert not alive(started[2].pid)
        assert [(note.slot, note.lane) for note in started[2:]] == [(0, 1), (0, 1)]
        assert it.stop() == 0


def test_abort_leaves_an_only_worker_its_successor(lab: Lab, runtime_directory: Path) -> None:
    with lab("late_successor", workers=2, roll_strategy="stop-first") as it:
        it.wait_ready(2)
        it.send(signal.SIGHUP)
        it.wait_notes("started", 3)
        assert order(it, runtime_directory, "abort") == "1 worker not replaced"
        it.wait_ready(3)
        assert [note.slot for note in it.notes("started")].count(1) == 1
        it.send(signal.SIGHUP)
        it.wait_ready(5)
        assert it.stop() == 0


def test_a_slot_removed_while_it_is_empty(lab: Lab) -> None:
    with lab("slow_second_successor", workers=2, roll_strategy="stop-first") as it:
        it.wait_ready(2)
        it.send(signal.SIGHUP)
        it.wait_notes("started", 4)  # slot 1 has nobody but the one that hangs
        it.send(signal.SIGTTOU)
        it.send(signal.SIGHUP)  # the roll before has come to its end
        it.wait_ready(4)
        wait_until(lambda: len(it.pids()) == 1, 10, "one is left")
        assert it.stop() == 0


def test_a_slot_that_comes_back_while_two_workers_leave_it(lab: Lab) -> None:
    """The scoreboard has two records for a slot: a third worker waits until one has left."""
    with lab("slow_to_leave", workers=2) as it:
        it.wait_ready(2)
        it.send(signal.SIGHUP)
        it.wait_ready(3)  # slot 0: the old one takes its time
        it.wait_notes("order-retire", 1)
        (first,) = (note.pid for note in it.notes("ready") if (note.slot, note.generation) == (0, 0))
        os.kill(first, signal.SIGKILL)
        it.wait_ready(4)  # slot 1: so does the old one there
        it.wait_notes("order-retire", 2)
        (successor,) = (note.pid for note in it.notes("ready") if (note.slot, note.generation) == (1, 1))
        (old,) = (note.pid for note in it.notes("ready") if (note.slot, note.generation) == (1, 0))
        for pid in (old, successor):
            os.kill(pid, signal.SIGSTOP)  # so that it takes its time
        it.send(signal.SIGTTOU)
        it.wait_log("removing worker 2")
        it.send(signal.SIGTTIN)
        it.wait_log("adding worker 2")
        it.send(signal.SIGTTIN)
        it.wait_ready(5)  # that is worker 3, which nothing stands in the way of
        assert [note.slot for note in it.notes("started")].count(1) == 2
        os.kill(successor, signal.SIGCONT)
        third = it.wait_notes("ready", 6)[5]
        assert (third.slot, third.generation, third.lane) == (1, 2, 1)
        os.kill(old, signal.SIGCONT)
        assert it.stop() == 0


def test_no_process_for_a_successor(lab: Lab) -> None:
    """The kernel refuses a fork: the old one goes on, and so does the server."""
    with lab("obey", workers=2) as it:
        it.wait_ready(2)
        before = it.pids()
        limits = resource.prlimit(it.pid, resource.RLIMIT_NOFILE)
        used = len(os.listdir(f"/proc/{it.pid}/fd"))
        resource.prlimit(it.pid, resource.RLIMIT_NOFILE, (used, limits[1]))
        it.send(signal.SIGHUP)
        it.wait_log("cannot start a process for worker 1")
        it.wait_log("1 more workers stay as they are")
        resource.prlimit(it.pid, resource.RLIMIT_NOFILE, limits)
        assert it.pids() == before
        it.send(signal.SIGHUP)
        it.wait_notes("left", 2)
        assert it.stop() == 0


# Anything at any time


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("strategy", ["start-first", "stop-first"])
def test_reloads_deaths_and_aborts_in_any_order(
    lab: Lab, runtime_directory: Path, strategy: str, seed: int
) -> None:
    """Never a third worker in a slot, and in the end as many workers as there should be, and no roll."""
    surge = {"roll_strategy": strategy, "max_surge": 2}
    with lab("hasty", workers=3, **surge, restart_limit=10_000, restart_backoff_max=0.1) as it:
        it.wait_ready(3)
        chance = random.Random(seed)
        client = Client(str(runtime_directory / f"{it.pid}.sock"))
        for _ in range(60):
            what = chance.choice(("reload", "reload", "abort", "kill", "more", "fewer", "wait"))
            if what in ("reload", "abort"):
                client.order(what)
            elif what in ("more", "fewer"):
                it.send(signal.SIGTTIN if what == "more" else signal.SIGTTOU)
            elif what == "kill":
                status = client.status()
                if pids := [worker["pid"] for worker in status["workers"]]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(chance.choice(pids), signal.SIGKILL)
            time.sleep(chance.choice((0.0, 0.01, 0.05)))
        client.order("workers", 3)

        def calm() -> bool:
            status = client.status()
            states = [worker["state"] for worker in status["workers"]]
            return status["server"]["state"] == "running" and states == ["ready"] * 3

        wait_until(calm, 20, f"three workers, and no roll; {client.status()}")
        assert order(it, runtime_directory, "reload")  # and it can all begin again
        wait_until(calm, 20, f"three workers, and no roll; {client.status()}")
        assert it.stop() == 0
    assert it.notes("third") == []
