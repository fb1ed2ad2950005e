"""leanserve.supervisor.steering, leanserve.worker.wakeups: who gets a new connection, with real workers."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harness import wait_until
from supervised import Supervised, begin, get

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reuseport groups, EPOLLEXCLUSIVE")

APP = """
import asyncio, os, time

marks = os.environ.get("TEST_MARKS")
if os.environ.get("TEST_SLOW_FROM") and len(os.listdir(marks)) >= int(os.environ["TEST_SLOW_FROM"]):
    time.sleep(60)  # loads its model
if marks:
    open(os.path.join(marks, str(os.getpid())), "w").close()

async def app(scope, receive, send):
    if scope["type"] != "http":
        raise RuntimeError("no")
    path, query = scope["path"], scope["query_string"]
    if path == "/block":
        open(f"begun-{os.getpid()}", "w").close()
        time.sleep(float(query))
    elif path == "/wait":
        await asyncio.sleep(float(query))
    elif path == "/ready":
        scope["extensions"]["leanserve.worker"]["set_ready"](query == b"yes")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": str(os.getpid()).encode()})
"""


@pytest.fixture(params=["uvloop", "asyncio"])
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def serve(folder: Path, **settings: Any) -> Supervised:
    (folder / "app.py").write_text(APP)
    settings.setdefault("lifespan", "off")
    return Supervised("app:app", folder, settings, entry="leanserve.worker.process:main")


def takers(port: int, count: int = 60) -> Counter[int]:
    """The pids that answer so many connections, one after the other."""
    return Counter(int(get(port)) for _ in range(count))


def wait_takers(port: int, wanted: set[int]) -> None:
    """Steering follows events, so the last word may be on its way."""
    wait_until(lambda: set(takers(port)) == wanted, 20, f"connections for {wanted} alone")


def answered(client: socket.socket) -> bool:
    return bool(select.select([client], [], [], 0)[0])


def test_each_of_the_workers_gets_its_share(tmp_path: Path, loop: str) -> None:
    with serve(tmp_path, workers=4, loop=loop) as server:
        server.wait_ready(4)
        shares = takers(server.port, 400)
        assert len(shares) == 4
        assert min(shares.values()) > 40


@pytest.mark.parametrize("accept", ["per-worker", "shared"])
def test_a_worker_that_computes_gets_no_connection_while_another_idles(
    tmp_path: Path, loop: str, accept: str
) -> None:
    with serve(tmp_path, workers=2, loop=loop, accept=accept) as server:
        server.wait_ready(2)
        with begin(server.port, "/block?5") as busy:
            wait_until(lambda: list(tmp_path.glob("begun-*")), 20, "the application begins")
            seen = takers(server.port, 100)
            assert not answered(busy)
            assert len(seen) == 1
            busy.settimeout(20)
            assert str(next(iter(seen))) not in busy.recv(1000).decode()


def test_a_shared_queue_is_served_in_turns(tmp_path: Path, loop: str) -> None:
    with serve(tmp_path, workers=4, loop=loop, accept="shared") as server:
        server.wait_ready(4)
        shares = takers(server.port, 200)
        assert len(shares) == 4
        assert max(shares.values()) - min(shares.values()) < 20


def test_long_requests_that_come_all_at_once_are_shared_out(tmp_path: Path, loop: str) -> None:
    """Eight connections stand in the shared queue before the first request is sent."""
    with serve(tmp_path, workers=2, loop=loop, accept="shared") as server:
        server.wait_ready(2)
        for _ in range(3):
            clients = [socket.create_connection(("127.0.0.1", server.port), 15) for _ in range(8)]
            for client in clients:
                client.sendall(b"GET /block?0.3 HTTP/1.1\r\nhost: a\r\n\r\n")
            shares: Counter[bytes] = Counter()
            for client in clients:
                with client:
                    client.settimeout(20)
                    shares[client.recv(1000).rsplit(b"\n")[-1]] += 1
            assert sorted(shares.values()) in ([4, 4], [3, 5])


def test_who_loads_gets_nothing_until_it_is_ready(
    tmp_path: Path, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "marks").mkdir()
    monkeypatch.setenv("TEST_MARKS", str(tmp_path / "marks"))
    monkeypatch.setenv("TEST_SLOW_FROM", "1")
    with serve(tmp_path, workers=3, loop=loop) as server:
        server.wait_ready(1)
        assert len(takers(server.port, 100)) == 1
        server.send(signal.SIGTERM)
        assert server.wait_code() == 0


def test_who_wants_no_requests_gets_no_connections(tmp_path: Path, loop: str) -> None:
    with serve(tmp_path, workers=3, loop=loop) as server:
        server.wait_ready(3)
        pids = set(takers(server.port))
        assert len(pids) == 3
        first = int(get(server.port, "/ready?no"))
        wait_takers(server.port, pids - {first})
        second = int(get(server.port, "/ready?no"))
        wait_takers(server.port, pids - {first, second})
        last = int(get(server.port, "/ready?no"))
        assert last == (pids - {first, second}).pop()
        wait_takers(server.port, pids)  # somebody has to answer


def test_connections_of_a_worker_that_is_killed_go_to_its_siblings(
    tmp_path: Path, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "marks").mkdir()
    monkeypatch.setenv("TEST_MARKS", str(tmp_path / "marks"))
    monkeypatch.setenv("TEST_SLOW_FROM", "2")
    with serve(tmp_path, workers=2, loop=loop) as server:
        server.wait_ready(2)
        one, other = takers(server.port)
        # It is woken for connections, and cannot take them.
        os.kill(one, signal.SIGSTOP)
        clients = [begin(server.port) for _ in range(40)]
        os.kill(one, signal.SIGKILL)
        for client in clients:
            with client:
                client.settimeout(20)
                assert client.recv(1000).endswith(b"%d" % other)
        assert set(takers(server.port)) == {other}  # the successor loads for a minute
        server.send(signal.SIGTERM)
        assert server.wait_code() == 0


def assert_served_or_refused(port: int) -> None:
    """From now on each connection is answered, until there are no more."""
    for _ in range(2000):
        try:
            get(port)
        except ConnectionRefusedError:
            return
    raise AssertionError("it goes on accepting")


def test_a_stop_while_a_slot_boots(tmp_path: Path, loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "marks").mkdir()
    monkeypatch.setenv("TEST_MARKS", str(tmp_path / "marks"))
    monkeypatch.setenv("TEST_SLOW_FROM", "2")
    with serve(tmp_path, workers=2, loop=loop, drain_timeout=20) as server:
        server.wait_ready(2)
        os.kill(next(iter(takers(server.port))), signal.SIGKILL)  # its successor loads for a minute
        server.wait_log(" started", 3)
        with begin(server.port, "/wait?8") as long:
            assert len(takers(server.port)) == 1
            server.send(signal.SIGTERM)
            assert_served_or_refused(server.port)
            assert not answered(long)  # not only at the end
            long.settimeout(20)
            assert long.recv(1000).startswith(b"HTTP/1.1 200")
        assert server.wait_code(20) == 0


def test_a_worker_that_is_killed_while_it_drains(tmp_path: Path, loop: str) -> None:
    with serve(tmp_path, workers=2, loop=loop, drain_timeout=20) as server:
        server.wait_ready(2)
        stuck = begin(server.port, "/block?60")
        wait_until(lambda: list(tmp_path.glob("begun-*")), 20, "the application begins")
        with begin(server.port, "/wait?8") as long:
            (idle,) = takers(server.port)
            server.send(signal.SIGTERM)
            server.wait_log("stopping")
            os.kill((server.pids() - {idle}).pop(), signal.SIGKILL)
            assert_served_or_refused(server.port)
            assert not answered(long)
            long.settimeout(20)
            assert long.recv(1000).startswith(b"HTTP/1.1 200")
        stuck.close()
        assert server.wait_code(20) == 0


def test_who_leaves_alone_leaves_the_queues_of_the_others(tmp_path: Path, loop: str) -> None:
    with serve(tmp_path, workers=1, loop=loop) as server:
        server.wait_ready(1)
        for times in (1, 2, 3):
            server.send(signal.SIGTTIN)
            server.wait_ready(times + 1)
            wait_until(lambda: len(takers(server.port, 40)) == 2, 20, "two workers")
            server.send(signal.SIGTTOU)
            server.wait_log("has left", times)
            assert len(takers(server.port, 20)) == 1


def test_slots_that_come_and_go_are_counted_as_the_kernel_does(tmp_path: Path) -> None:
    with serve(tmp_path, workers=2) as server:
        server.wait_ready(2)
        said = Counter[str]()
        for word in ("adding", "adding", "removing", "adding", "removing", "removing", "adding", "adding"):
            server.send(signal.SIGTTIN if word == "adding" else signal.SIGTTOU)
            said[word] += 1
            server.wait_log(f"{word} worker", said[word])
        wait_until(lambda: len(takers(server.port, 80)) == 4, 20, "four workers")
        pids = set(takers(server.port, 80))
        chosen = int(get(server.port, "/ready?no"))
        wait_takers(server.port, pids - {chosen})
        # The siblings have the listeners of slots that came after them, and of their successors.
        newest = max(pids - {chosen})
        os.kill(newest, signal.SIGSTOP)
        clients = [begin(server.port) for _ in range(40)]
        os.kill(newest, signal.SIGKILL)
        for client in clients:
            with client:
                client.settimeout(20)
                assert client.recv(1000).startswith(b"HTTP/1.1 200")


def test_a_worker_with_enough_to_do_leaves_connections_to_others(tmp_path: Path, loop: str) -> None:
    with serve(tmp_path, workers=2, loop=loop, accept_below=1) as server:
        server.wait_ready(2)
        one = begin(server.port, "/wait?4")
        wait_until(lambda: len(takers(server.port, 20)) == 1, 20, "one is full")
        idle = next(iter(takers(server.port, 40)))
        other = begin(server.port, "/wait?4")
        third = begin(server.port)
        with one, other, third:
            for client in (one, other, third):
                client.settimeout(20)
            assert int(one.recv(1000).rsplit(b"\n")[-1]) != idle
            assert int(other.recv(1000).rsplit(b"\n")[-1]) == idle
            assert third.recv(1000).startswith(b"HTTP/1.1 200")  # it waited in the kernel


def test_one_full_worker_leaves_its_queue_to_the_kernel(tmp_path: Path, loop: str) -> None:
    with serve(tmp_path, workers=1, loop=loop, accept_below=1) as server:
        server.wait_ready(1)
        with begin(server.port, "/wait?1") as one, begin(server.port) as other:
            for client in (one, other):
                client.settimeout(20)
            assert one.recv(1000).startswith(b"HTTP/1.1 200")
            assert other.recv(1000).startswith(b"HTTP/1.1 200")
