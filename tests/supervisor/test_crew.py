"""The crew: who is started where, with what, and who has ended."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import wait_until
from leanserve.errors import SettingsError
from leanserve.listeners import open_listeners
from leanserve.scoreboard import WorkerState
from leanserve.settings import Settings
from leanserve.supervisor.child import Child, ChildMove, ChildState
from leanserve.supervisor.crew import Crew
from leanserve.supervisor.signals import SignalQueue


@pytest.fixture
def crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    monkeypatch.setenv("LEANSERVE_TEST_JOURNAL", str(tmp_path / "journal"))
    yield from make("obey")


def make(app: Any, loops: int = 1, **settings: Any) -> Iterator[Crew]:
    built = Settings.build(port=0, **settings)
    listeners = open_listeners(built.listen, 2)
    signals = SignalQueue()
    signals.open()
    it = Crew(app, built, listeners, signals, "stand_ins:main", loops)
    yield it
    for child in list(it.children.values()):
        child.kill()
        os.waitpid(child.pid, 0)
        child.bury()
    signals.close()
    it.close()
    listeners.close()


def wait_ready(child: Child) -> None:
    wait_until(lambda: list(child.channel.receive()), 5, "it is ready")
    child.machine.advance(ChildMove.TOLD_READY)


def wait_ended(crew: Crew, count: int = 1) -> list[tuple[Child, int]]:
    ended: list[tuple[Child, int]] = []

    def enough() -> bool:
        ended.extend(crew.take_ended())
        return len(ended) >= count

    wait_until(enough, 5, "the end")
    for child, _ in ended:
        child.bury()
    return ended


def test_generations_and_lanes(crew: Crew) -> None:
    first, second, other = crew.start(0), crew.start(0), crew.start(1)
    assert [(child.slot, child.generation, child.lane) for child in (first, second, other)] == [
        (0, 0, 0), (0, 1, 1), (1, 0, 0),
    ]
    assert crew.in_slot(0) == [first, second]
    for child in (first, second, other):
        wait_ready(child)
    os.kill(first.pid, signal.SIGKILL)
    ((child, code),) = wait_ended(crew)
    assert (child, code) == (first, -signal.SIGKILL)
    third = crew.start(0)
    assert (third.generation, third.lane) == (2, 0)
    assert crew.in_slot(0) == [second, third]


def test_who_serves(crew: Crew) -> None:
    old, new = crew.start(0), crew.start(0)
    wait_ready(old)
    assert crew.serving(0) == [old, new]
    old.retire("retire", time.monotonic() + 9)
    assert crew.serving(0) == [new]
    assert old.state is ChildState.RETIRING
    assert crew.in_slot(0) == [old, new]
    assert wait_ended(crew) == [(old, 0)]


def test_all_that_have_ended(crew: Crew) -> None:
    assert crew.take_ended() == []
    children = [crew.start(slot) for slot in (0, 0, 1)]
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
    assert {child.pid for child, _ in wait_ended(crew, 3)} == {child.pid for child in children}
    assert crew.children == {}


def test_the_record_is_that_of_this_process(crew: Crew) -> None:
    child = crew.start(0)
    wait_ready(child)
    assert crew.record(child) is None
    crew.scoreboard.lane(0, 0).begin(child.pid, 0)
    crew.scoreboard.lane(0, 0).tell_in_flight(1)
    record = crew.record(child)
    assert record is not None
    assert record.in_flight == 1


@pytest.fixture
def holding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    """Each worker takes two of seven slots and one of three places."""
    monkeypatch.setenv("LEANSERVE_TEST_JOURNAL", str(tmp_path / "journal"))
    yield from make("holds_tokens", max_concurrent_requests=7, max_queue=3)


def taken(crew: Crew) -> list[int]:
    return [tokens.taken() for tokens in crew.tokens]


def test_without_a_limit_there_are_no_tokens(crew: Crew) -> None:
    assert crew.tokens == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_dead_worker_held_is_given_back(holding: Crew, number: signal.Signals) -> None:
    for child in (first := holding.start(0), second := holding.start(1)):
        wait_ready(child)
    assert taken(holding) == [4, 2]
    first.signal(number)
    wait_ended(holding)
    assert taken(holding) == [2, 1]
    third = holding.start(0)
    wait_ready(third)
    assert taken(holding) == [4, 2]
    second.signal(number)
    third.signal(number)
    wait_ended(holding, 2)
    assert taken(holding) == [0, 0]


def test_a_successor_shares_the_limit_of_the_one_that_it_replaces(holding: Crew) -> None:
    for child in (old := holding.start(0), new := holding.start(0)):
        wait_ready(child)
    assert (old.lane, new.lane) == (0, 1)
    assert taken(holding) == [4, 2]
    old.signal(signal.SIGKILL)
    wait_ended(holding)
    assert taken(holding) == [2, 1]


def test_a_lost_token_is_back_when_nobody_is_left(holding: Crew) -> None:
    """A worker that is killed between taking a token and noting it."""
    child = holding.start(0)
    wait_ready(child)
    assert holding.tokens[0].take()
    assert taken(holding) == [3, 1]
    child.signal(signal.SIGKILL)
    wait_ended(holding)
    assert taken(holding) == [0, 0]


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.1])
def test_killed_at_any_moment(holding: Crew, after_s: float) -> None:
    """In the worst one, a single token is lost; the limit never grows."""
    first, second = holding.start(0), holding.start(1)
    wait_ready(first)
    time.sleep(after_s)  # it has taken nothing yet, or all of it
    second.signal(signal.SIGKILL)
    wait_ended(holding)
    assert taken(holding) in ([2, 1], [3, 1], [2, 2])


def test_no_sibling_keeps_a_channel_open(crew: Crew) -> None:
    """The supervisor's end is held by the supervisor alone: its death is seen at once."""
    children = [crew.start(0), crew.start(1), crew.start(0)]
    for child in children:
        wait_ready(child)
    ours = {os.readlink(f"/proc/self/fd/{child.channel.fileno()}") for child in children}
    for child in children:
        theirs = {os.readlink(f"/proc/{child.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{child.pid}/fd")}
        assert not ours & theirs


@pytest.mark.parametrize("app", [lambda: None, object])
def test_spawn_needs_something_that_can_be_pickled(app: Any) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for crew in make(app if app is not object else type("Local", (), {})(), start_method="spawn"):
        with pytest.raises(SettingsError, match="needs names, not objects"):
            crew.start(0)
        assert crew.children == {}
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_record_of_one_that_was_killed_says_so(crew: Crew) -> None:
    """It could not say so itself, and a successor may be long in coming."""
    child = crew.start(0)
    wait_ready(child)
    lane = crew.scoreboard.lane(0, 0)
    lane.begin(child.pid, 0)
    lane.enter(WorkerState.READY, 1)
    assert crew.restarts == 0
    os.kill(child.pid, signal.SIGKILL)
    wait_ended(crew)
    assert crew.scoreboard.read(0, 0).state is WorkerState.STOPPED
    assert crew.record(child) is not None  # what it took with it is still to be read
    crew.start(0)
    assert crew.restarts == 1


@pytest.fixture
def threaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    """As `holding`, and each process has two workers."""
    monkeypatch.setenv("LEANSERVE_TEST_JOURNAL", str(tmp_path / "journal"))
    yield from make("holds_tokens", loops=2, max_concurrent_requests=9, max_queue=5)


def test_a_process_with_several_workers_is_in_several_slots(threaded: Crew) -> None:
    old, new = threaded.start(0), threaded.start(0)
    for child in (old, new):
        wait_ready(child)
    assert str(old) == f"1-2 (pid {old.pid})"
    assert (old.lane, new.lane) == (0, 1)
    assert [threaded.in_slot(slot) for slot in (0, 1, 2)] == [[old, new], [old, new], []]
    assert [record.slot for record in threaded.records(new)] == [0, 1]
    assert taken(threaded) == [8, 4]
    old.signal(signal.SIGKILL)
    wait_ended(threaded)
    assert taken(threaded) == [4, 2]
    states = [threaded.scoreboard.read(slot, lane).state for slot in (0, 1) for lane in (0, 1)]
    assert states == [WorkerState.STOPPED, WorkerState.BOOTING] * 2
