"""leanserve.supervisor.hang: who is ended for standing still, and who is not."""

from __future__ import annotations

import os
import signal
import textwrap
import time
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import pytest

from harness import wait_until
from leanserve.channel import Channel
from leanserve.listeners import open_listeners
from leanserve.settings import Settings
from leanserve.supervisor.child import Child, ChildMove, ChildState
from leanserve.supervisor.crew import Crew
from leanserve.supervisor.hang import Hangs
from leanserve.supervisor.signals import SignalQueue
from supervised import Supervised, begin, get

Lab = Callable[..., Supervised]

LIMIT = Settings.build(hang_limit=8, kill_grace=3)
PID = 4711  # nobody's: signals are noted, and not sent


class Noting(Child):
    """Notes the signals that it would be sent."""

    def signal(self, number: int) -> None:
        sent.append(number)


sent: list[int] = []


@pytest.fixture
def crew() -> Iterator[Crew]:
    sent.clear()
    listeners, signals = open_listeners(Settings.build(port=0).listen, 1), SignalQueue()
    crew = Crew("app", Settings(), listeners, signals, "stand_ins:main")
    ours, theirs = Channel.pair()
    crew.children[PID] = Noting(PID, 0, 0, 0, ours, 0.0)
    crew.scoreboard.lane(0, 0).begin(PID, 0)
    yield crew
    ours.close()
    theirs.close()
    crew.close()
    listeners.close()
    signals.close()


def look(
    hangs: Hangs, until_s: float, now_s: float = 0.0, beats: Callable[[float], None] | None = None
) -> None:
    """Look whenever it is time to, from `now_s` on."""
    while now_s <= until_s:
        if beats is not None:
            beats(now_s)
        hangs.keep_time(now_s, LIMIT)
        now_s = min(hangs.look_at_s, now_s + 1)


def test_without_a_limit_nobody_looks(crew: Crew) -> None:
    hangs = Hangs(crew)
    hangs.keep_time(5.0, Settings())
    assert hangs.look_at_s == inf
    hangs.keep_time(6.0, LIMIT)  # it may come later, in place
    assert hangs.look_at_s == 7.0
    hangs.keep_time(6.5, Settings())
    assert hangs.look_at_s == inf


def test_stands_still(crew: Crew) -> None:
    child = crew.children[PID]
    child.machine.advance(ChildMove.TOLD_READY)
    crew.scoreboard.lane(0, 0).beat(7)
    hangs = Hangs(crew)
    look(hangs, 8.0)
    assert (child.state, sent) == (ChildState.READY, [])
    look(hangs, 9.5, 9.0)
    assert child.state is ChildState.LATE
    assert sent[-1] == signal.SIGTERM
    assert len(sent) == 2  # the stacks were asked for before
    assert child.kill_at_s == 9.0 + 3
    look(hangs, 60.0, 10.0)
    assert len(sent) == 2  # once


def test_a_boot_is_none(crew: Crew) -> None:
    look(Hangs(crew), 600.0)
    assert sent == []


def test_a_beat_now_and_then_is_enough(crew: Crew) -> None:
    crew.children[PID].machine.advance(ChildMove.TOLD_READY)
    lane = crew.scoreboard.lane(0, 0)
    look(Hangs(crew), 600.0, beats=lambda now_s: lane.beat(int(now_s) // 7 * 7 + 1))
    assert sent == []


def test_time_in_which_we_did_not_run_does_not_count(crew: Crew) -> None:
    crew.children[PID].machine.advance(ChildMove.TOLD_READY)
    crew.scoreboard.lane(0, 0).beat(7)
    hangs = Hangs(crew)
    look(hangs, 5.0)
    look(hangs, 1002.0, 1000.0)  # somebody had stopped us, and them
    assert sent == []
    look(hangs, 1010.0, 1003.0)
    assert sent[-1:] == [signal.SIGTERM]


# With real processes

APP = """
import re, time

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    if scope["path"] == "/gil":
        re.match(r"(a+)+$", "a" * 60 + "b")  # for years, in C, and never lets go
    if scope["path"] == "/sleep":
        time.sleep(float(scope["query_string"] or 600))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": b"ok"})
"""


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """`with lab(workers=2) as it:`; `app` is the source of the application."""

    def make(app: str = APP, **settings: Any) -> Supervised:
        (tmp_path / "served_app.py").write_text(textwrap.dedent(app))
        settings = {"lifespan": "off", "log_level": "info", **settings}
        return Supervised("served_app:app", tmp_path, settings, entry="leanserve.worker.process:main")

    return make


@pytest.mark.parametrize("path", ["/gil", "/sleep"])
def test_a_hung_worker_says_where_and_is_replaced(lab: Lab, path: str) -> None:
    with lab(hang_limit=2) as it:
        it.wait_ready(1)
        hung = begin(it.port, path)
        it.wait_log(" ready in ", 2, within_s=30)
        hung.close()
        (told,) = it.lines("stacks, then SIGTERM")
        (died,) = it.lines(" died: ")
        assert "its loop stood still for more than 2 s (hang_limit)" in died
        log = it.log
        # Stacks of all threads, in which the line that blocks is, and before the end.
        stacks = log[log.index(told) : log.index(died)]
        assert 'served_app.py", line ' in stacks.partition("Current thread")[2]
        assert log.count("did not leave in time: SIGKILL") == 1  # a SIGTERM has to wait for the loop
        assert get(it.port) == b"ok"
        assert it.stop() == 0


def test_a_worker_that_comes_back_leaves_by_itself(lab: Lab) -> None:
    with lab(hang_limit=2, kill_grace=20.0) as it:
        it.wait_ready(1)
        late = begin(it.port, "/sleep?6")
        it.wait_log(" ready in ", 2, within_s=30)
        assert b" 200 " in late.recv(1000)  # what it had begun is finished
        late.close()
        assert it.lines("SIGKILL") == []
        assert len(it.lines(" died: ")) == 1
        assert it.stop() == 0


@pytest.mark.parametrize("path", ["/gil", "/sleep?8"])
def test_without_a_limit_a_busy_worker_lives(lab: Lab, path: str) -> None:
    with lab() as it:
        it.wait_ready(1)
        pids = it.pids()
        busy = begin(it.port, path)
        time.sleep(20 if os.environ.get("LEANSERVE_DEMANDS") == "full" else 4)
        assert it.pids() == pids
        assert it.lines(" died: ") == []
        busy.close()
        it.stop(signal.SIGQUIT)


def test_a_long_start_is_no_hang(lab: Lab) -> None:
    with lab("import time\ntime.sleep(5)\n" + APP, hang_limit=2) as it:
        it.wait_log(" ready in ", 1, within_s=30)
        assert it.lines("hang_limit") == []
        assert it.stop() == 0


def test_when_all_were_stopped_nobody_is_late(lab: Lab) -> None:
    with lab(hang_limit=2, workers=2) as it:
        it.wait_ready(2)
        pids = it.pids()
        os.killpg(it.pid, signal.SIGSTOP)  # its session, made by us
        time.sleep(5)
        os.killpg(it.pid, signal.SIGCONT)
        time.sleep(3)
        assert it.pids() == pids
        assert it.lines("hang_limit") == []
        assert it.stop() == 0


def test_a_stop_while_one_is_being_ended(lab: Lab) -> None:
    with lab(hang_limit=2, kill_grace=30.0) as it:
        it.wait_ready(1)
        hung = begin(it.port, "/gil")
        it.wait_log("stacks, then SIGTERM", within_s=30)
        it.send(signal.SIGTERM)
        it.send(signal.SIGQUIT)
        wait_until(lambda: it.running.poll() is not None, 20, "the end")
        hung.close()
