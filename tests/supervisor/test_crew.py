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
from leanserve.settings import Settings
from leanserve.supervisor.child import Child, ChildMove, ChildState
from leanserve.supervisor.crew import Crew
from leanserve.supervisor.signals import SignalQueue


@pytest.fixture
def crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    monkeypatch.setenv("LEANSERVE_TEST_JOURNAL", str(tmp_path / "journal"))
    yield from make("obey")


def make(app: Any, **settings: Any) -> Iterator[Crew]:
    built = Settings.build(port=0, **settings)
    listeners = open_listeners(built.listen, 2)
    signals = SignalQueue()
    signals.open()
    it = Crew(app, built, listeners, signals, "stand_ins:main")
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
    crew.scoreboard.lane(0, 0).request_started()
    record = crew.record(child)
    assert record is not None
    assert record.in_flight == 1


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
