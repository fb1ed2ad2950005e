"""``--worker-kind thread``: workers in threads of one process do what workers in processes do."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from harness import Load, Serving, alive, wait_until
from leanserve.admin.client import Client
from supervised import Supervised, begin, get

REAL = "leanserve.worker.process:main"

APP = """
import asyncio, json, os, sys, threading, time
MODEL = object()
startups, shutdowns = [], []

async def app(scope, receive, send):
    me = threading.current_thread().name
    if scope["type"] == "lifespan":
        await receive()
        startups.append(me)
        if startups[3:] and os.path.exists("refuse"):
            await send({"type": "lifespan.startup.failed", "message": "no place for a fourth"})
            return
        scope["state"]["thread"] = me
        await send({"type": "lifespan.startup.complete"})
        await receive()
        os.write(1, b"SHUTDOWN " + me.encode() + bytes([10]))
        await send({"type": "lifespan.shutdown.complete"})
        return
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": me})
        while (await receive())["type"] != "websocket.disconnect":
            pass
        return
    path, argument = scope["path"], scope["query_string"].decode()
    if path == "/wait":
        await asyncio.sleep(float(argument))
    if path == "/block":
        time.sleep(float(argument))
    if path == "/hang" and not me.endswith("-1"):
        time.sleep(120)
    if path == "/end":
        asyncio.get_running_loop().call_soon(sys.exit, 7)
    facts = {
        "pid": os.getpid(), "thread": me, "model": id(MODEL), "startups": startups,
        "state": scope["state"]["thread"], "worker": os.environ["LEANSERVE_WORKER"],
    }
    await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
    if path == "/stream":
        for _ in range(int(argument)):
            await send({"type": "http.response.body", "body": b"x" * 100, "more_body": True})
            await asyncio.sleep(0.05)
        await send({"type": "http.response.body", "body": b"end"})
        return
    await send({"type": "http.response.body", "body": json.dumps(facts).encode()})
"""

Lab = Callable[..., Supervised]
Hold = Callable[[int, str, int], list[socket.socket]]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """`with lab(workers=4) as it:`"""

    def make(text: str = APP, **settings: Any) -> Supervised:
        (tmp_path / "threaded_app.py").write_text(text)
        flat = {"worker_kind": "thread", "workers": 4, **settings}
        return Supervised("threaded_app:app", tmp_path, flat, entry=REAL)

    return make


@pytest.fixture
def hold() -> Iterator[Hold]:
    """`hold(port, "/wait?30", 6)`: so many requests, each on a connection that is closed after the test."""
    with ExitStack() as stack:
        yield lambda port, path, count: [stack.enter_context(begin(port, path)) for _ in range(count)]


def ask(it: Supervised, path: str = "/") -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(get(it.port, path))
    return facts


def ask_all(it: Supervised, count: int = 4) -> dict[str, dict[str, Any]]:
    """By name, what so many different threads say."""
    found: dict[str, dict[str, Any]] = {}

    def enough() -> bool:
        facts = ask(it)
        found[facts["thread"]] = facts
        return len(found) >= count

    wait_until(enough, 20, f"answers of {count} threads, so far {found}")
    return found


NAMES = [f"leanserve-worker-{number}" for number in (1, 2, 3, 4)]


@pytest.mark.parametrize("settings", [{}, {"accept": "shared"}, {"start_method": "spawn"}, {"preload": True}])
def test_one_process_and_as_many_loops(lab: Lab, settings: dict[str, Any]) -> None:
    with lab(**settings) as it:
        it.wait_log("worker 1-4 (pid")
        it.wait_ready()
        # Whoever wakes first gets a connection of a shared socket: nobody can say which ones answer.
        found = ask_all(it, 2 if settings.get("accept") else 4)
        assert set(found) <= set(NAMES)
        (pid,) = {facts["pid"] for facts in found.values()}
        assert len({facts["model"] for facts in found.values()}) == 1
        assert all(facts["state"] == name for name, facts in found.items())
        assert all(facts["startups"] == NAMES for facts in found.values())  # once per loop, in order
        assert {facts["worker"] for facts in found.values()} == {"0"}
        assert pid in it.pids()
        assert len(it.pids()) == (2 if settings.get("preload") else 1)
        assert it.stop() == 0
        assert sorted(it.lines("SHUTDOWN")) == [f"SHUTDOWN {name}" for name in NAMES]


def test_the_scoreboard_has_each(lab: Lab, hold: Hold, tmp_path: Path) -> None:
    control = str(tmp_path / "control")
    with lab(control_socket=control, stall_limit=None) as it:
        it.wait_ready()
        (pid,) = it.pids()
        hold(it.port, "/wait?30", 24)
        wait_until(lambda: len(workers(control)) == 4, 20, "four workers")
        assert {worker["pid"] for worker in workers(control)} == {pid}
        wait_until(lambda: sum(each["in_flight"] for each in workers(control)) == 24, 20, "all are at work")
        assert {each["state"] for each in workers(control)} == {"ready"}
        running = json.loads(Client(control)._ask("GET", "/running"))["workers"]
        assert {each["worker"]: len(each["running"]) for each in running} == {
            each["worker"]: min(each["in_flight"], 20) for each in workers(control)
        }
        os.kill(pid, signal.SIGKILL)
        it.wait_log("requests in flight: ")
        assert it.stop() == 0


def workers(control: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = Client(control).status()["workers"]
    return found


def read_all(sock: socket.socket) -> bytes:
    found = b""
    while data := sock.recv(65536):
        found += data
    return found


def test_a_stop_finishes_streams_and_closes_websockets(lab: Lab, hold: Hold) -> None:
    with lab(drain_timeout=3.0) as it, ExitStack() as stack:
        it.wait_ready()
        sockets = [stack.enter_context(connect(f"ws://127.0.0.1:{it.port}/")) for _ in range(16)]
        assert len({str(each.recv()) for each in sockets}) > 1
        streams = hold(it.port, "/stream?20", 16)
        for stream in streams:
            assert stream.recv(20)
        it.send(signal.SIGTERM)
        assert all(read_all(stream).endswith(b"end\r\n0\r\n\r\n") for stream in streams)
        for each in sockets:
            with pytest.raises(ConnectionClosed) as closed:
                each.recv(timeout=15)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1012
        assert it.wait_code() == 0
        assert len(it.lines("SHUTDOWN")) == 4


def test_a_second_signal_hurries_all(lab: Lab, hold: Hold) -> None:
    with lab(drain_timeout=300.0) as it:
        it.wait_ready()
        hold(it.port, "/wait?300", 16)
        time.sleep(0.2)  # they are on their way
        it.send(signal.SIGTERM)
        it.wait_log("stopping: what runs gets up")
        it.send(signal.SIGTERM)
        assert it.wait_code() == 0
        assert len(it.lines("SHUTDOWN")) == 4


def test_sigterm_for_all_processes(lab: Lab, hold: Hold) -> None:
    """systemd sends it to the whole group, and the supervisor's order follows."""
    with lab(drain_idle_timeout=1.0) as it:
        it.wait_ready()
        waiting = hold(it.port, "/wait?1", 12)
        time.sleep(0.2)  # they are on their way
        os.killpg(it.pid, signal.SIGTERM)
        assert all(read_all(sock).startswith(b"HTTP/1.1 200") for sock in waiting)
        assert it.wait_code() == 0


def test_sigterm_for_the_process_alone(lab: Lab) -> None:
    """As for any worker: it drains, and leaves its listeners to a successor."""
    with lab() as it:
        it.wait_ready()
        before = ask(it)["pid"]
        os.kill(before, signal.SIGTERM)
        it.wait_ready(2)
        assert ask(it)["pid"] != before
        assert it.stop() == 0


@pytest.mark.parametrize("preload", [False, True])
def test_rolls_under_load(tmp_path: Path, preload: bool) -> None:
    options = ["--worker-kind", "thread", "--workers", "3", *(["--preload"] if preload else [])]
    with Serving("raw_app:app", tmp_path / "log", options) as server, Load(server) as load:
        for count in (1, 2, 3):
            load.wait_answered(100)
            server.running.send_signal(signal.SIGHUP)
            wait_until(lambda n=count: server.output.count("has left") >= n, 30, "a roll")
        load.wait_answered(100)
        assert len(load.answered) == 4  # so many processes
    assert load.failures == []
    assert load.refused == 0


def test_killed_and_there_again(lab: Lab) -> None:
    with lab() as it:
        it.wait_ready()
        before = ask(it)["pid"]
        os.kill(before, signal.SIGKILL)
        it.wait_ready(2)
        found = ask_all(it)
        assert {facts["pid"] for facts in found.values()} != {before}
        assert it.stop() == 0


def test_when_the_supervisor_is_killed(lab: Lab, hold: Hold) -> None:
    with lab() as it:
        it.wait_ready()
        family = it.pids()
        hold(it.port, "/block?60", 1)
        os.kill(it.pid, signal.SIGKILL)
        it.running.wait(10)
        wait_until(lambda: not any(map(alive, family)), 6, "the process gone")


def test_the_end_of_a_thread_is_the_end_of_the_process(lab: Lab, hold: Hold) -> None:
    with lab() as it:
        it.wait_ready()
        before = ask(it)["pid"]
        waiting = hold(it.port, "/wait?1", 12)
        time.sleep(0.2)  # they are on their way
        begin(it.port, "/end").close()
        answers = [read_all(sock) for sock in waiting]
        it.wait_log("a thread has ended: the process ends")
        it.wait_log("died: exit code 1")
        it.wait_ready(2)
        assert len(ask_all(it)) == 4
        assert ask(it)["pid"] != before
        # Those of the other threads were finished before.
        assert sum(answer.startswith(b"HTTP/1.1 200") for answer in answers) > 0
        it.send(signal.SIGTERM)
        assert it.running.wait(20) == 0


def test_a_startup_that_fails_in_one_of_them(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "refuse").touch()
    with lab(log_level="info") as it:
        assert it.running.wait(20) == 3
    (line,) = it.lines("ERROR")
    assert "cannot start: " in line
    assert "no place for a fourth" in line
    assert len(it.lines("SHUTDOWN")) == 3


def test_a_successor_that_fails_has_taken_nobodys_request(lab: Lab, tmp_path: Path) -> None:
    slow = APP.replace("        if startups[3:]", "        await asyncio.sleep(0.5)\n        if startups[3:]")
    with lab(slow, log_level="info") as it:
        it.wait_ready()
        before = ask(it)["pid"]
        seen, errors, go_on = set(), [], threading.Event()

        def load() -> None:
            while not go_on.is_set():
                try:
                    seen.add(ask(it, "/block?0.005")["pid"])
                except (OSError, ValueError, http.client.HTTPException) as error:
                    errors.append(repr(error))

        clients = [threading.Thread(target=load) for _ in range(8)]
        for client in clients:
            client.start()
        (tmp_path / "refuse").touch()
        it.send(signal.SIGHUP)
        wait_until(lambda: "replacement of worker 1 failed" in it.log, 30, it.log)
        go_on.set()
        for client in clients:
            client.join(20)
        assert errors == []
        assert seen == {before}
        assert it.stop() == 0


def test_their_number_is_fixed(lab: Lab, tmp_path: Path) -> None:
    control = str(tmp_path / "control")
    with lab(control_socket=control) as it:
        it.wait_ready()
        it.send(signal.SIGTTIN)
        it.wait_log("the number of workers stays: with worker_kind thread their number is fixed")
        it.send(signal.SIGTTOU)
        it.wait_log("the number of workers stays: with worker_kind thread their number is fixed", 2)
        assert Client(control).order("workers", 4)["ok"]
        refused = Client(control).order("workers", 5)
        assert not refused["ok"]
        assert refused["text"].startswith("there are 4 workers, and with worker_kind thread their number is")
        assert len(ask_all(it)) == 4
        assert it.stop() == 0


@pytest.mark.parametrize("preload", [False, True])
def test_one_limit_for_all(lab: Lab, hold: Hold, tmp_path: Path, preload: bool) -> None:
    """And what a killed process held is given back, for each of its workers."""
    control = str(tmp_path / "control")
    with lab(max_concurrent_requests=6, max_queue=0, preload=preload, control_socket=control) as it:
        it.wait_ready()
        pid = ask(it)["pid"]
        waiting = hold(it.port, "/wait?30", 6)
        wait_until(lambda: sum(each["in_flight"] for each in workers(control)) == 6, 20, "all are at work")
        assert {status(it.port) for _ in range(12)} == {b"503"}
        os.kill(pid, signal.SIGKILL)
        it.wait_log("requests in flight: ")
        (line,) = it.lines("requests in flight: ")
        assert int(line.rpartition(" ")[2]) >= 6  # one that has been refused may not have ended
        it.wait_ready(2)
        for sock in waiting:
            sock.close()
        hold(it.port, "/wait?30", 5)
        time.sleep(0.2)  # they are on their way
        assert status(it.port) == b"200"
        assert it.stop() == 0


def status(port: int) -> bytes:
    with begin(port) as sock:
        return sock.recv(65536)[9:12]


def test_enough_requests_replace_the_process(lab: Lab) -> None:
    with lab(workers=2, limit_max_requests=5, drain_idle_timeout=1.0) as it:
        it.wait_ready()
        before = ask(it)["pid"]
        wait_until(lambda: ask(it)["pid"] != before, 20, "a successor")
        assert it.stop() == 0


def test_a_stalled_loop_is_told_and_the_others_go_on(lab: Lab, hold: Hold) -> None:
    with lab(stall_limit=0.3) as it:
        it.wait_ready()
        (blocked,) = hold(it.port, "/block?2", 1)
        it.wait_log("the event loop is stalled")
        assert "by GET '/block'" in it.lines("the event loop is stalled")[0]
        assert b"200" in read_all(blocked)
        assert it.stop() == 0


def test_a_loop_that_hangs_ends_the_process(lab: Lab, hold: Hold) -> None:
    """Whichever it is: nobody can end a thread."""
    with lab(hang_limit=2.0, stall_limit=None) as it:
        it.wait_ready()
        before = ask(it)["pid"]
        hold(it.port, "/hang", 12)  # all but one would
        it.wait_log("its loop has stood still for", within_s=30)
        it.wait_ready(2)
        assert ask(it)["pid"] != before
        assert it.stop() == 0


def test_wsgi(lab: Lab, tmp_path: Path) -> None:
    text = (
        "import threading\n"
        "def app(environ, start_response):\n"
        "    start_response('200 OK', [('content-length', '2')])\n"
        "    return [b'ok']\n"
    )
    with lab(text, wsgi_threads=2) as it:
        it.wait_ready()
        assert {get(it.port) for _ in range(24)} == {b"ok"}
        assert it.stop() == 0
