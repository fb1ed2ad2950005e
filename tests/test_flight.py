"""leanserve.flight: what a worker had at work is known when it has ended, however it has."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import wait_until
from leanserve.flight import BERTHS, TARGET_BYTES, Flight, FlightRecorder, FlightRecords, describe_flights
from leanserve.scoreboard import MAX_SLOTS, Scoreboard
from supervised import SOON_S, Supervised, begin, get

Lab = Callable[..., Supervised]


@pytest.fixture
def board() -> Iterator[Scoreboard]:
    board = Scoreboard.create()
    yield board
    board.close()


def exchange(recorder: FlightRecorder, target: bytes, started: float = 0.0, **headers: bytes) -> Any:
    """One that is noted, as a worker does it."""
    berth = recorder.free.pop()
    berth.value = target
    pairs = [(name.encode(), value) for name, value in headers.items()]
    return SimpleNamespace(berth=berth, started=started, request=SimpleNamespace(headers=pairs))


def end(recorder: FlightRecorder, each: Any) -> None:
    each.berth.value = b""
    recorder.free.append(each.berth)
    recorder.forget(each.berth)


@pytest.mark.parametrize(("slot", "lane"), [(0, 0), (3, 1), (MAX_SLOTS - 1, 1)])
def test_what_is_noted_is_read_once(board: Scoreboard, slot: int, lane: int) -> None:
    records = FlightRecords(board.fd)
    recorder = FlightRecorder(board.fd, slot, lane)
    old = exchange(recorder, b"POST /a", 12.5, id=b"17")
    recorder.note_ages([old], b"id")
    ended, new = exchange(recorder, b"/ended"), exchange(recorder, b"/new")
    end(recorder, ended)
    assert records.take(slot, lane) == [Flight(b"POST /a", b"17", 12.5), Flight(b"/new", b"", 0.0)]
    assert records.take(slot, lane) == []
    assert new.berth.value == b""
    assert [records.take(other, 0) for other in (1, 2)] == [[], []]  # and nothing of others


def test_a_berth_that_is_used_again_has_nothing_of_before(board: Scoreboard) -> None:
    records = FlightRecords(board.fd)
    recorder = FlightRecorder(board.fd, 0, 0)
    first = exchange(recorder, b"/a/long/path", 5.0, id=b"one")
    recorder.note_ages([first], b"id")
    end(recorder, first)
    second = exchange(recorder, b"/b")
    assert second.berth is first.berth
    assert records.take(0, 0) == [Flight(b"/b", b"", 0.0)]


def test_every_berth(board: Scoreboard) -> None:
    records = FlightRecords(board.fd)
    recorder = FlightRecorder(board.fd, 0, 1)
    FlightRecorder(board.fd, 1, 0).free[-1].value = b"/other"
    made = [exchange(recorder, b"/%d" % number) for number in range(BERTHS)]
    assert recorder.free == []
    recorder.note_ages(made, b"")
    assert sorted(flight.target for flight in records.take(0, 1)) == sorted(b"/%d" % n for n in range(BERTHS))
    assert [flight.target for flight in records.take(1, 0)] == [b"/other"]


def test_the_longest_target(board: Scoreboard) -> None:
    records = FlightRecords(board.fd)
    recorder = FlightRecorder(board.fd, 0, 0)
    berth = recorder.free.pop()
    with pytest.raises(ValueError, match="too long"):
        berth.value = b"/" * (TARGET_BYTES + 2)
    berth.value = b"/" * TARGET_BYTES
    (flight,) = records.take(0, 0)
    assert flight.target == b"/" * TARGET_BYTES
    assert flight.describe(1.0, 0.0).startswith(f"GET '{'/' * TARGET_BYTES}'... ")


@pytest.mark.parametrize(
    ("flight", "text"),
    [
        (Flight(b"/predict", b"", 87.7), "GET '/predict' 12.3 s"),
        (Flight(b"POST /predict", b"a-1", 87.7), "POST '/predict' 12.3 s (id 'a-1')"),
        (Flight(b"/new", b"", 0.0), "GET '/new' less than 0.5 s"),
        (Flight(b"/\x1b[31m\xff'", b"\x9b\n", 99.0), "GET \"/\\x1b[31m\\xff'\" 1.0 s (id '\\x9b\\n')"),
    ],
)
def test_text(flight: Flight, text: str) -> None:
    assert flight.describe(100.0, 99.55) == text
    assert text.isascii()
    assert text.isprintable()


def test_a_line_has_an_end() -> None:
    flights = [Flight(b"/%d" % number, b"", 99.0) for number in range(9)]
    text = describe_flights(flights, 700, 100.0, 100.0)
    assert text.count("GET") == 5
    assert text.endswith(" and 695 more")
    assert describe_flights([], 3, 100.0, 100.0) == ""


# With real processes

APP = """
import asyncio, ctypes

async def app(scope, receive, send):
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        await asyncio.sleep(600)
    if scope["type"] != "http":
        return
    if scope["path"] == "/crash":
        ctypes.string_at(0)
    if scope["path"].startswith("/wait"):
        await asyncio.sleep(600)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": b"ok"})
"""


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """`with lab(workers=2) as it:`."""

    def make(**settings: Any) -> Supervised:
        (tmp_path / "served_app.py").write_text(textwrap.dedent(APP))
        settings = {"lifespan": "off", "log_level": "info", "flight_recorder": True, **settings}
        return Supervised("served_app:app", tmp_path, settings, entry="leanserve.worker.process:main")

    return make


def say(port: int, head: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), 15)
    sock.sendall(head)
    return sock




@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_who_was_killed_says_what_it_had_at_work(lab: Lab, loop: str) -> None:
    with lab(loop=loop) as it:
        it.wait_ready(1)
        for _ in range(5):
            get(it.port, "/done")
        (pid,) = it.pids()
        socks = [
            say(it.port, b"GET /wait/1?secret HTTP/1.1\r\nhost: a\r\nx-request-id: 4f-1\r\n\r\n"),
            say(it.port, b"POST /wait/2 HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n"),
            say(
                it.port,
                b"GET /ws HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
                b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            ),
        ]
        time.sleep(2.5)  # for a tick of the loop, which notes age and id
        os.kill(pid, signal.SIGKILL)
        it.wait_log(" died: ")
        (line,) = it.lines(" died: ")
        assert "signal SIGKILL; requests in flight: 3: " in line
        for part in ("GET '/wait/1' ", "(id '4f-1')", "POST '/wait/2' ", "GET '/ws' "):
            assert part in line
        assert "secret" not in line
        assert "/done" not in line
        assert "less than" not in line
        for sock in socks:
            sock.close()
        it.wait_ready(2)
        (successor,) = it.pids()
        os.kill(successor, signal.SIGKILL)
        it.wait_log(" died: ", 2)
        assert it.lines(" died: ")[1].endswith("requests in flight: 0")  # nothing of its predecessor's
        it.wait_ready(3)
        assert it.stop() == 0


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_the_request_that_crashes_is_named(lab: Lab, start_method: str) -> None:
    """In the first moment of its life, by method and path, with the stack of the thread that crashed."""
    with lab(start_method=start_method) as it:
        it.wait_log(" ready in ", 1, within_s=3 * SOON_S)
        begin(it.port, "/wait/other").close()
        sock = say(it.port, b"DELETE /crash HTTP/1.1\r\nhost: a\r\n\r\n")
        it.wait_log(" died: ")
        sock.close()
        (line,) = it.lines(" died: ")
        assert "signal SIGSEGV" in line
        assert "DELETE '/crash' less than " in line
        assert "Fatal Python error: Segmentation fault" in it.log
        stack = it.log.partition("Fatal Python error")[2]
        assert 'served_app.py", line ' in stack
        it.wait_log(" ready in ", 2, within_s=3 * SOON_S)
        assert it.stop() == 0


def test_switched_off_only_the_number_is_known(lab: Lab) -> None:
    with lab(flight_recorder=False) as it:
        it.wait_ready(1)
        sock = begin(it.port, "/crash")
        it.wait_log(" died: ")
        sock.close()
        assert it.lines(" died: ")[0].endswith("requests in flight: 1")
        it.wait_ready(2)
        assert it.stop() == 0


def test_more_than_there_are_berths(lab: Lab) -> None:
    with lab() as it:
        it.wait_ready(1)
        with contextlib.ExitStack() as socks:
            for _ in range(BERTHS + 20):
                socks.enter_context(begin(it.port, "/wait"))
            wait_until(lambda: get(it.port) == b"ok", 15, "an answer behind all of them")
            (pid,) = it.pids()
            os.kill(pid, signal.SIGKILL)
            it.wait_log(" died: ")
        line = it.lines(" died: ")[0]
        in_flight = int(line.partition("requests in flight: ")[2].partition(":")[0])
        assert in_flight in (BERTHS + 20, BERTHS + 21)  # the one that was answered may not have ended
        assert line.endswith(f" and {in_flight - 5} more")
        it.wait_ready(2)
        assert it.stop() == 0
