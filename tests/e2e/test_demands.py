"""Clauses of docs/reference/demands.md that want processes and signals.

Counts are a tenth of what the demands say, or less; all of them with
``LEANSERVE_DEMANDS=full pytest -s tests/e2e/test_demands.py``.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import json
import os
import random
import selectors
import signal
import socket
import ssl
import stat
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness import AnswerReader, Certificates, Serving, descendants, fetch, wait_until
from supervised import APP, Supervised
from ws_frames import CLOSE, parse

Serve = Callable[..., Serving]

FULL = os.environ.get("LEANSERVE_DEMANDS") == "full"
pytestmark = pytest.mark.timeout(900 if FULL else 60)

GET = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
SHAKE = (
    b"GET %s HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
)
loops = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def demands(serve: Serve, journal: Path) -> Serve:
    """The application of these tests; `environment` may be added to."""

    def start(*options: str, environment: dict[str, str] | None = None, **facts: Any) -> Serving:
        known = {"LEANSERVE_TEST_JOURNAL": str(journal), **(environment or {})}
        return serve("demands_app:app", *options, environment=known, **facts)

    return start


def get(path: bytes) -> bytes:
    return b"GET %s HTTP/1.1\r\nhost: a\r\n\r\n" % path


def read_all(connection: socket.socket) -> bytes:
    """All until the end or the reset."""
    whole = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            whole += data
    return whole


def facts(server: Serving) -> dict[str, int]:
    found: dict[str, int] = json.loads(fetch(server, "/facts").body)
    return found


def settled(server: Serving, holds: Callable[[dict[str, int]], bool], within_s: float = 15) -> dict[str, int]:
    """What the worker holds, when that is as it should be, or at the end of the time."""
    end = time.monotonic() + within_s
    while not holds(found := facts(server)) and time.monotonic() < end:
        time.sleep(0.1)
    return found


# Row 3: streams at a shutdown

_DRAIN_S = 1.5


@loops
def test_streams_that_do_not_listen_have_the_whole_window(demands: Serve, journal: Path, loop: str) -> None:
    """Row 3: neither of them ends before the drain does; the exit is a second behind it, with code 0, and the
    lifespan has ended in order."""
    server = demands("--drain-timeout", str(_DRAIN_S), "--loop", loop)
    with server.connect() as stream, server.connect() as websocket:
        stream.sendall(get(b"/events"))
        websocket.sendall(SHAKE % b"/silent")
        assert b"data" in stream.recv(1000) + stream.recv(1000)
        assert b" 101 " in websocket.recv(1000)
        server.running.send_signal(signal.SIGTERM)
        told_s = time.monotonic()
        ((opcode, _, payload),) = parse(read_all(websocket))
        window_s = time.monotonic() - told_s
        assert (opcode, payload) == (CLOSE, struct.pack("!H", 1012))
        body = read_all(stream)
        assert body.count(b"data: x") >= 5
        assert b"0\r\n\r\n" not in body  # it does not look complete
        server.exit_code = None  # that it was cut is in the log
        server.wait_stopped(_DRAIN_S + 5)
        exit_s = time.monotonic() - told_s
    print(f"{loop}: window {window_s:.2f} s, exit {exit_s:.2f} s after SIGTERM, drain {_DRAIN_S} s")
    assert window_s >= _DRAIN_S - 0.05
    assert exit_s <= _DRAIN_S + (1 if FULL else 3)
    assert server.running.returncode == 0, server.output
    assert "Traceback" not in server.output
    assert journal.read_text().splitlines() == ["disconnect 1012", "shutdown begun", "shutdown done"]


@loops
def test_streams_that_listen_end_at_once(demands: Serve, journal: Path, loop: str) -> None:
    """Row 3: the event is in the scopes of HTTP and of WebSocket, and set long before the drain is over."""
    server = demands("--drain-timeout", "50", "--loop", loop)
    with server.connect() as stream, server.connect() as websocket:
        stream.sendall(get(b"/told"))
        websocket.sendall(SHAKE % b"/told")
        assert b"data" in stream.recv(1000) + stream.recv(1000)
        assert b" 101 " in websocket.recv(1000)
        server.running.send_signal(signal.SIGTERM)
        assert read_all(stream).endswith(b"bye\n\n\r\n0\r\n\r\n")
        ((opcode, _, payload),) = parse(websocket.recv(1000))
        assert (opcode, payload) == (CLOSE, struct.pack("!H", 4000))
    server.wait_stopped(15)
    assert journal.read_text().splitlines() == ["disconnect 4000", "shutdown begun", "shutdown done"]


# Row 4: requests around the keep-alive timer


class Racers:
    """Connections whose second request is sent a little before or after the idle timer; what becomes of it.

    Attributes:
        ends: "served"; "closed": the end was here before the request was sent; "crossed": it came when the
            request had been sent; "lost": a reset without an end before it, which the kernel sends when a
            socket is closed that has something to read.
    """

    def __init__(self, server: Serving, idle_s: float, trials: int, lanes: int = 20) -> None:
        self.ends: Counter[str] = Counter()
        self._server, self._idle_s, self._left = server, idle_s, trials
        self._dice = random.Random(4)
        self._selector = selectors.DefaultSelector()
        self._due: list[tuple[float, int, socket.socket]] = []
        for _ in range(min(lanes, trials)):
            self._open()

    def run(self) -> None:
        while self._selector.get_map():
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                self._send(heapq.heappop(self._due)[2])
            wait_s = self._due[0][0] - time.monotonic() if self._due else 1.0
            for key, _ in self._selector.select(max(wait_s - 0.0005, 0) if wait_s > 0.001 else 0):
                self._receive(key.fileobj, key.data)  # type: ignore[arg-type]

    def _open(self) -> None:
        self._left -= 1
        sock = self._server.connect()
        sock.setblocking(False)
        sock.send(GET)
        self._selector.register(sock, selectors.EVENT_READ, "first")

    def _end(self, sock: socket.socket, how: str) -> None:
        self.ends[how] += 1
        self._selector.unregister(sock)
        self._due = [item for item in self._due if item[2] is not sock]
        heapq.heapify(self._due)
        sock.close()
        if self._left > 0:
            self._open()

    def _send(self, sock: socket.socket) -> None:
        try:
            sock.send(GET)
        except OSError:
            self._end(sock, "closed")
        else:
            self._selector.modify(sock, selectors.EVENT_READ, "second")

    def _receive(self, sock: socket.socket, turn: str) -> None:
        try:
            data = sock.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(sock, "lost" if turn == "second" and error.errno == errno.ECONNRESET else "closed")
            return
        if turn == "first":
            assert data.startswith(b"HTTP/1.1 200")
            when = time.monotonic() + self._idle_s + self._dice.uniform(-0.001, 0.001)
            heapq.heappush(self._due, (when, sock.fileno(), sock))
            self._selector.modify(sock, selectors.EVENT_READ, "waits")
        else:
            self._end(sock, "served" if data else "crossed" if turn == "second" else "closed")


@loops
def test_around_the_idle_timer_nothing_is_lost(demands: Serve, loop: str) -> None:
    """Row 4: from a millisecond before to a millisecond after it."""
    server = demands("--loop", loop, "--keep-alive-timeout", "0.05")
    racers = Racers(server, 0.05, 10_000 if FULL else 1000)
    racers.run()
    print(loop, dict(racers.ends))
    assert racers.ends["lost"] == 0, racers.ends
    assert min(racers.ends["served"], racers.ends["closed"] + racers.ends["crossed"]) > 0, racers.ends


# Row 7: the phases of a drain


@loops
@pytest.mark.parametrize("workers", [1, 2])
def test_a_drain_accepts_then_refuses_and_never_stalls(demands: Serve, loop: str, workers: int) -> None:
    """Row 7: ready is 503 at once, new clients are served until the delay is over; every answer says close;
    then a connect is refused, while a request of before is still at work."""
    options = ("--pre-stop-delay", "0.5", "--drain-timeout", "20", "--workers", str(workers), "--loop", loop)
    server = demands(*options)
    server.worker_pids(workers)
    seen: list[str] = []
    longest_s = 0.0
    with server.connect() as running, server.connect() as idle:
        running.sendall(get(b"/slow?3"))
        idle.sendall(GET)
        assert AnswerReader(idle).read() is not None
        time.sleep(0.1)
        server.running.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        while server.running.poll() is None and len(seen) < 5000:
            began = time.monotonic()
            try:
                answer = fetch(server, "/ready")
                seen.append(f"{answer.status} {answer.last}")
            except ConnectionRefusedError:
                seen.append("refused")
            longest_s = max(longest_s, time.monotonic() - began)
            time.sleep(0.02)
        assert idle.recv(1) == b""
        last = AnswerReader(running).read()
        assert last is not None
        assert (last.body, last.last) == (b"slow", True)
    served = seen.count("503 True")
    print(f"{loop}, {workers}: {served} served, {len(seen) - served} refused, longest {longest_s:.3f} s")
    assert served >= 3
    assert seen == ["503 True"] * served + ["refused"] * (len(seen) - served)
    assert seen.count("refused") >= 3
    server.wait_stopped()


# Row 11: what closed connections leave


def _reset_behind_an_answer(server: Serving) -> None:
    with server.connect() as connection:
        connection.sendall(GET)
        connection.recv(1000)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _connect(server: Serving) -> None:
    server.connect().close()


def _half_a_request(server: Serving) -> None:
    with server.connect() as connection:
        request = b"POST /upload?0 HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nhalf"
        connection.sendall(request[: 12 + 9 * (connection.getsockname()[1] % 6)])


@loops
@pytest.mark.parametrize("kind", [_reset_behind_an_answer, _connect, _half_a_request])
def test_connections_that_end_badly_cost_no_memory(demands: Serve, loop: str, kind: Any) -> None:
    """Row 11: with the cycle collector off, no object, task or timer more, and within 2 MiB."""
    server = demands("--loop", loop, environment={"LEANSERVE_TEST_GC": "off"})

    def many(count: int) -> None:
        for number in range(count):
            kind(server)
            if number % 20 == 0:  # else thousands stand in the accept queue, and then live at once
                fetch(server, "/")

    for _ in range(3):  # what the allocator keeps has grown to its size by then
        many(300)
    before = settled(server, lambda found: found["objects"] <= 3)
    many(20_000 if FULL else 2000)
    after = settled(server, lambda found: found["objects"] <= before["objects"])
    print(f"{loop}, {kind.__name__}: {before} -> {after}")
    for name in ("objects", "tasks", "fds"):
        assert after[name] <= before[name], (before, after)
    assert after["timers"] < 120
    assert after["rss"] - before["rss"] < 2 << 20


# Row 25: clients that never read

# What a running exchange itself takes. Up to Python 3.12.8 and 3.13.1 messages are copied, and it counts.
_EXCHANGE_BYTES = 16384


@loops
@pytest.mark.parametrize("kind", ["stream", "websocket"])
def test_clients_that_never_read_cost_a_water_mark(demands: Serve, loop: str, kind: str) -> None:
    """Row 25: 200 of them, 1 GiB offered, 64 KiB and one message each."""
    clients, messages = 200, (1 << 30) // 200 // 65536
    server = demands("--loop", loop)
    with ExitStack() as stack:

        def offers(count: int, connections: list[socket.socket]) -> None:
            path = b"/offer?%d" % count
            for sock in connections:
                sock.sendall(get(path) if kind == "stream" else SHAKE % path)

        def connect() -> socket.socket:
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((server.host, server.port))
            sock.sendall(GET)  # what a connection itself costs is not asked
            assert sock.recv(1000)
            return sock

        offers(0, [connect()])  # imports what it takes
        connections = [connect() for _ in range(clients)]
        before = facts(server)
        offers(messages, connections)
        last = 0

        def still(found: dict[str, int]) -> bool:
            nonlocal last
            if found["taken"] == last and found["offered"] - found["taken"] == clients * 65536:
                return True
            last = found["taken"]
            return False

        after = settled(server, still)
        grown = after["rss"] - before["rss"]
        print(f"{loop}, {kind}: {grown >> 20} MiB for {clients}, send() took {after['taken'] >> 20} MiB")
        assert after["offered"] - after["taken"] == clients * 65536, after  # all of them wait
        assert grown < clients * (65536 + 65536 + _EXCHANGE_BYTES)
    server.stop()


# Row 38: unix sockets


def test_a_unix_socket_through_deaths_and_rolls(demands: Serve, tmp_path: Path) -> None:
    """Row 38: its mode; it stays through the death of a worker and a roll, and whoever comes second is told;
    it is removed by its owner, at the end; and one that a killed server left is taken over."""
    path = tmp_path / "socket"
    server = demands("--workers", "2", "--uds-mode", "600", uds=path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    inode = path.stat().st_ino
    before = server.worker_pids(2)
    os.kill(min(before), signal.SIGKILL)
    wait_until(lambda: len(descendants(server.pid)) == 2, 15, "a new worker")
    server.running.send_signal(signal.SIGHUP)
    wait_until(lambda: not before & descendants(server.pid), 30, f"the old workers gone\n{server.output}")
    assert fetch(server, "/").status == 200
    second = Serving("demands_app:app", tmp_path / "second.log", uds=path, exit_code=3)
    second.start()
    assert second.running.wait(15) == 3, second.output
    assert "another process serves it" in second.output
    assert fetch(server, "/").status == 200
    assert path.stat().st_ino == inode
    server.kill()
    server.exit_code = None
    assert path.exists()
    third = demands("--workers", "2", uds=path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    third.stop()
    assert not path.exists()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_socket_stays(tmp_path: Path, kind: str) -> None:
    """Row 38: an error in one line, and nothing is removed."""
    path = tmp_path / "socket"
    if kind == "file":
        path.write_text("precious")
    else:
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(tmp_path / "other"))
        path.symlink_to(tmp_path / "other")
    server = Serving("demands_app:app", tmp_path / "log", uds=path, exit_code=3)
    server.start()
    assert server.running.wait(15) == 3, server.output
    assert len(server.output.strip().splitlines()) == 1, server.output
    assert path.is_symlink() if kind == "link" else path.read_text() == "precious"


# Row 41: the end of the lifespan


@loops
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_shutdown_of_the_lifespan_is_not_cut_short(
    demands: Serve, journal: Path, loop: str, count: int
) -> None:
    """Row 41: however often ^C is pressed, to the whole foreground group; and no traceback."""
    server = demands("--loop", loop, "--workers", "2", environment={"LEANSERVE_TEST_SHUTDOWN_S": "1"})
    server.worker_pids(2)
    os.killpg(server.pid, signal.SIGINT)
    for _ in range(count - 1):
        wait_until(lambda: journal.exists(), 10, "a shutdown begun")
        time.sleep(0.1)
        os.killpg(server.pid, signal.SIGINT)
    server.wait_stopped()
    assert sorted(journal.read_text().splitlines()) == ["shutdown begun"] * 2 + ["shutdown done"] * 2
    assert "KeyboardInterrupt" not in server.output


# Row 42: idle and active connections at the end


@loops
def test_a_stop_with_idle_and_active_connections(demands: Serve, loop: str) -> None:
    """Row 42: 100 idle and 10 active; the active ones are answered, and the exit is within the drain."""
    server = demands("--loop", loop, "--drain-timeout", "15", "--workers", "2")
    with ExitStack() as stack:
        idle = [stack.enter_context(server.connect()) for _ in range(100)]
        active = [stack.enter_context(server.connect()) for _ in range(10)]
        for connection in idle[:50]:  # the others never say anything
            connection.sendall(GET)
            assert AnswerReader(connection).read() is not None
        for connection in active:
            connection.sendall(get(b"/slow?0.5"))
        time.sleep(0.2)
        server.running.send_signal(signal.SIGTERM)
        for connection in active:
            answer = AnswerReader(connection).read()
            assert answer is not None
            assert (answer.body, answer.last) == (b"slow", True)
        server.wait_stopped(15)
        assert all(connection.recv(1) == b"" for connection in idle)


# Row 46: uploads


@loops
@pytest.mark.parametrize("coding", ["content-length", "chunked"])
def test_an_upload_is_not_kept(demands: Serve, loop: str, coding: str) -> None:
    """Row 46: an application that sleeps between its receives costs 4 MiB at most, however long the body."""
    server = demands("--loop", loop)
    size = (1 << 30) if FULL else (64 << 20)
    piece = b"x" * (1 << 20)
    for count in (8, size >> 20):  # the first warms up
        before = facts(server)
        most = 0
        with server.connect() as connection:
            head = b"POST /upload?0.0005 HTTP/1.1\r\nhost: a\r\n"
            chunked = coding == "chunked"
            head += b"transfer-encoding: chunked" if chunked else b"content-length: %d" % (count << 20)
            connection.sendall(head + b"\r\n\r\n")
            began = time.monotonic()
            for number in range(count):
                connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                if number % max(count // 32, 1) == 0:
                    most = max(most, facts(server)["rss"])
            if chunked:
                connection.sendall(b"0\r\n\r\n")
            answer = AnswerReader(connection).read()
            assert answer is not None
            assert int(answer.body) == count << 20
    grown = most - before["rss"]
    print(f"{loop}, {coding}: {grown >> 10} KiB, {time.monotonic() - began:.1f} s for {count} MiB")
    assert grown < 4 << 20


# Row 50: TLS connections that end in the middle, or in order


@contextmanager
def _plain(server: Serving) -> Iterator[socket.socket]:
    with socket.create_connection((server.host, server.port), 10) as connection:
        yield connection


def _hello(certificates: Certificates) -> bytes:
    outgoing = ssl.MemoryBIO()
    client = certificates.client_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


@loops
def test_tls_connections_leave_nothing(demands: Serve, loop: str, certificates: Certificates) -> None:
    """Row 50: handshakes abandoned at every stage, and normal closes: descriptors as before, memory within a
    tenth."""
    server = demands("--loop", loop, "--tls-handshake-timeout", "0.5", certificates=certificates)
    hello = _hello(certificates)
    context = certificates.client_context()

    def abandon(number: int) -> None:
        with _plain(server) as connection:
            connection.sendall(hello[: (0, 5, len(hello) // 2, len(hello))[number % 4]])
            if number % 4 == 3:
                connection.recv(100)
            if number % 8 < 4:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def close(number: int) -> None:
        with _plain(server) as plain, context.wrap_socket(plain, server_hostname="localhost") as connection:
            if number % 2:
                connection.sendall(GET)
                connection.recv(1000)
            if number % 3:
                with contextlib.suppress(OSError):
                    connection.unwrap()

    def many(count: int) -> None:
        with ExitStack() as stack:  # and some who say nothing more, and do not leave
            for number in range(100):
                connection = stack.enter_context(_plain(server))
                connection.sendall(hello[: len(hello) * (number % 2)])
            for number in range(count):
                abandon(number)
                close(number)

    for _ in range(3):  # what the allocator keeps has grown to its size by then
        many(300)
    before = settled(server, lambda found: found["objects"] <= 3)
    many(15_000 if FULL else 500)
    after = settled(server, lambda found: found["fds"] <= before["fds"] and found["objects"] <= 3)
    print(f"{loop}: {before} -> {after}")
    for name in ("fds", "objects", "tasks"):
        assert after[name] <= before[name], (before, after)
    assert after["rss"] < before["rss"] * 1.1


# Row 35: a TLS context of the operator's own

_MAKES = """
import os, ssl

def make():
    with open("made", "a") as file:
        file.write(f"{os.getpid()}\\n")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain("certificate.pem", "key.pem")
    context.set_alpn_protocols(["http/1.1"])
    return context
"""


def test_a_context_is_made_in_each_worker(tmp_path: Path, certificates: Certificates) -> None:
    """Row 35: by the factory that is named, in workers and their successors and nowhere else."""
    (tmp_path / "makes.py").write_text(_MAKES)
    (tmp_path / "served_app.py").write_text(APP)
    for file in (certificates.certificate, certificates.key):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = {"workers": 2, "ssl_context_factory": "makes:make"}
    client = certificates.client_context()
    client.set_alpn_protocols(["h2", "http/1.1"])
    with Supervised("served_app:app", tmp_path, settings, entry="leanserve.worker.process:main") as it:
        it.wait_ready(2)
        old = it.pids()
        it.send(signal.SIGHUP)
        it.wait_ready(4)
        wait_until(lambda: not old & it.pids(), 15, "the old ones leave")
        with (
            socket.create_connection(("127.0.0.1", it.port), 15) as raw,
            client.wrap_socket(raw, server_hostname="localhost") as sock,
        ):
            assert sock.selected_alpn_protocol() == "http/1.1"
            sock.sendall(get(b"/"))
            assert sock.recv(1000).startswith(b"HTTP/1.1 200")
        made = set(map(int, (tmp_path / "made").read_text().split()))
        assert made == old | it.pids()
        assert it.stop() == 0
