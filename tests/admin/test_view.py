"""Live, ready, started: each verdict from the words of a scoreboard."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from leanserve.admin.view import Verdict, View, judge_live, judge_ready, judge_started, look
from leanserve.scoreboard import Scoreboard, WorkerState
from leanserve.settings import AdminSettings
from leanserve.tally import Tally

S = 1_000_000_000
NOW = 1000 * S


@pytest.fixture
def board() -> Iterator[Scoreboard]:
    board = Scoreboard.create()
    board.tell_server(pid=1, born_ns=NOW - 100 * S, ready_ns=NOW - 99 * S, slots=2)
    yield board
    board.close()


def begin(board: Scoreboard, slot: int, state: WorkerState, beat_s: float = 0.5, lane: int = 0) -> None:
    writer = board.lane(slot, lane)
    writer.begin(100 + slot, 0)
    writer.enter(state, NOW - 50 * S)
    writer.beat(NOW - int(beat_s * S))


def judge(board: Scoreboard, judgement: object, **settings: object) -> Verdict:
    assert callable(judgement)
    verdict = judgement(look(board, NOW), AdminSettings(**settings))
    assert isinstance(verdict, Verdict)
    return verdict


def test_ready_workers_are_counted(board: Scoreboard) -> None:
    assert judge(board, judge_ready) == Verdict(False, "not ready: 0 of 2 workers ready, 1 wanted\n")
    begin(board, 0, WorkerState.READY)
    begin(board, 1, WorkerState.BOOTING)
    verdict = judge(board, judge_ready)
    assert verdict.good
    assert verdict.text.splitlines() == [
        "ready: 1 of 2 workers ready, 1 wanted",
        "worker 1 (pid 100): ready, last heartbeat 0.5 s ago",
        "worker 2 (pid 101): booting, last heartbeat 0.5 s ago",
    ]
    assert not judge(board, judge_ready, ready_workers=2).good


@pytest.mark.parametrize("state", [WorkerState.BOOTING, WorkerState.DRAINING, WorkerState.STOPPED])
def test_only_the_state_ready_is_ready(board: Scoreboard, state: WorkerState) -> None:
    begin(board, 0, state)
    assert not judge(board, judge_ready).good


def test_a_dead_worker_is_not_ready(board: Scoreboard) -> None:
    begin(board, 0, WorkerState.READY)
    board.bury(0, 0, 999)  # somebody else's pid: the lane has a new worker
    assert judge(board, judge_ready).good
    board.bury(0, 0, 100)
    assert not judge(board, judge_ready).good
    assert "worker 1" not in judge(board, judge_ready).text


def test_an_application_may_say_no(board: Scoreboard) -> None:
    begin(board, 0, WorkerState.READY)
    board.lane(0, 0).tell_app_ready(False)
    assert "worker 1 (pid 100): the application says that it is not ready" in judge(board, judge_ready).text
    assert not judge(board, judge_ready).good
    board.lane(0, 0).tell_app_ready(True)
    assert judge(board, judge_ready).good


def test_a_server_that_stops_is_live_and_not_ready(board: Scoreboard) -> None:
    begin(board, 0, WorkerState.READY)
    board.tell_server(stopping=1)
    assert judge(board, judge_ready).text.startswith("not ready: the server is stopping (1 of 2")
    assert judge(board, judge_live).good


def test_a_stall_is_told_and_counts_when_it_is_asked_for(board: Scoreboard) -> None:
    begin(board, 0, WorkerState.READY, beat_s=12)
    begin(board, 1, WorkerState.READY, beat_s=0.5)
    assert judge(board, judge_live).text.splitlines()[1].endswith("ready, last heartbeat 12.0 s ago")
    assert judge(board, judge_ready, ready_workers=2).good
    assert judge(board, judge_live, max_stall=10.0).good  # one moves
    stalled = judge(board, judge_ready, max_stall=10.0, ready_workers=2)
    assert not stalled.good
    assert "worker 1 (pid 100): its loop stands still, last heartbeat 12.0 s ago" in stalled.text
    begin(board, 1, WorkerState.DRAINING, beat_s=11)
    assert judge(board, judge_live, max_stall=10.0).text.startswith("not live: no loop has moved for 10 s")


def test_who_boots_or_has_left_cannot_stall(board: Scoreboard) -> None:
    assert judge(board, judge_live, max_stall=1.0).good
    begin(board, 0, WorkerState.BOOTING, beat_s=900)
    begin(board, 1, WorkerState.STOPPED, beat_s=900)
    assert judge(board, judge_live, max_stall=1.0).good


def test_started_once_is_started_for_ever(board: Scoreboard) -> None:
    assert judge(board, judge_started).good
    board.tell_server(ready_ns=0)
    assert judge(board, judge_started).text.startswith("not started: no worker has been ready yet")
    assert not judge(board, judge_started).good


def test_a_clock_that_was_read_before_is_no_negative_age(board: Scoreboard) -> None:
    assert View(NOW, board.read_server(), ()).age_s(NOW + 5) == 0


def test_counters_are_of_the_last_tick(board: Scoreboard) -> None:
    assert look(board, NOW).counted_ns == NOW  # nobody has told anything
    begin(board, 0, WorkerState.READY, beat_s=0.75)
    begin(board, 1, WorkerState.READY, beat_s=0.25)
    assert look(board, NOW).counted_ns == NOW - S // 4
    board.bury(1, 0, 101)
    assert look(board, NOW).counted_ns == NOW - S * 3 // 4
    assert look(board, NOW + 5 * S).counted_ns == NOW + 5 * S  # its loop stands still


def test_totals_are_of_the_dead_too(board: Scoreboard) -> None:
    for slot in (0, 1):
        begin(board, slot, WorkerState.READY)
        tally = Tally()
        tally.plain[2].append(0.1)
        board.lane(slot, 0).tell_tally(tally)
    board.bury(0, 0, 100)
    assert look(board, NOW).totals.duration.total == 2
    assert len(look(board, NOW).living) == 1
