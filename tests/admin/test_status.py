"""The JSON object: what it sums up, and growth per second."""

from __future__ import annotations

import json

from leanserve.admin.status import Rates, build_status, share
from leanserve.admin.view import look
from leanserve.scoreboard import Scoreboard, WorkerState
from leanserve.settings import AdminSettings
from leanserve.tally import LIMITS_S, Tally

S = 1_000_000_000


def test_rates_are_over_the_time_since_a_look_that_is_a_second_old() -> None:
    rates = Rates()
    assert rates.take(100 * S, {"a": 5}) == {}
    assert rates.take(100 * S + S // 10, {"a": 6}) == {}
    assert rates.take(102 * S, {"a": 25}) == {"over_s": 2.0, "a_per_s": 10.0}
    assert rates.take(102 * S + 1, {"a": 25}) == {"over_s": 2.000000001, "a_per_s": 20 / 2.000000001}
    assert rates.take(103 * S, {"a": 26}) == {"over_s": 1.0, "a_per_s": 1.0}
    assert rates.take(400 * S, {"a": 27}) == {}  # a mean of five minutes is no rate of now


def test_two_who_look_often_do_not_disturb_each_other() -> None:
    rates = Rates()
    for step in range(500):
        found = rates.take(step * S // 5, {"a": step})
        assert step < 5 or abs(found["a_per_s"] - 5) < 0.01
        assert step < 5 or found["over_s"] < 2


def test_the_whole() -> None:
    board = Scoreboard.create()
    board.tell_server(pid=9, born_ns=5 * S, ready_ns=6 * S, slots=2, crashes=1, restarts=3)
    for lane in (0, 1):
        writer = board.lane(0, lane)
        writer.begin(50 + lane, lane)
        writer.enter(WorkerState.READY, 7 * S)
        writer.beat(8 * S)
        writer.tell_in_flight(1)
        writer.connection_opened()
        writer.count_done(3, 10, 20)
        writer.tell_fastpath(3, 1, 0, 0)
        writer.tell_lag(S // 2)
        tally = Tally()
        tally.plain[2].append(0.001)
        tally.add(503, 600.0, None, "shutdown")
        writer.tell_tally(tally)
    board.bury(0, 0, 50)
    status = json.loads(json.dumps(build_status(look(board, 9 * S), AdminSettings(), Rates())))
    board.close()
    server = status["server"]
    assert (server["pid"], server["state"], server["uptime_s"]) == (9, "running", 4.0)
    assert (server["workers"], server["crashes"], server["restarts"]) == (2, 1, 3)
    assert [status[name]["good"] for name in ("live", "ready", "started")] == [True, True, True]
    assert status["ready"]["text"] == "ready: 1 of 2 workers ready, 1 wanted"
    assert (status["requests"], status["bytes_in"], status["connections_total"]) == (6, 20, 2)
    assert (status["in_flight"], status["connections"], status["websockets"]) == (1, 1, 0)
    (worker,) = status["workers"]
    assert (worker["pid"], worker["generation"]) == (51, 1)
    assert (worker["heartbeat_age_s"], worker["ready_for_s"]) == (1.0, 2.0)
    assert worker["loop_lag_s"] == 0.5
    assert status["fastpath"] == {"heads": 0.75, "frames": None}
    assert (status["statuses"]["2xx"], status["statuses"]["5xx"], status["causes"]["shutdown"]) == (2, 2, 2)
    assert tuple(status["limits_s"]) == LIMITS_S
    duration = status["duration"]
    assert (duration["count"], duration["sum_s"]) == (4, 1200.002)
    assert (duration["p50_s"], duration["p99_s"]) == (0.001953125, None)  # beyond all limits
    assert status["first_byte"]["count"] == 2


def test_states_of_the_server() -> None:
    board = Scoreboard.create()

    def state() -> str:
        return str(build_status(look(board, 9 * S), AdminSettings(), Rates())["server"]["state"])

    assert state() == "booting"
    board.tell_server(ready_ns=1)
    assert state() == "running"
    board.tell_server(rolling=1)
    assert state() == "rolling"
    board.tell_server(stopping=1)
    assert state() == "stopping"
    board.close()


def test_a_share_of_nothing() -> None:
    assert share([]) is None
    assert share([(0, 0)]) is None
    assert share([(3, 0), (0, 1)]) == 0.75
