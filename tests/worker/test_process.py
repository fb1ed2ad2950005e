"""Real worker processes under a real supervisor: boot, orders, signals, and the end of the parent."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import alive, free_port, listening_socket, wait_until
from leanserve.worker.process import _first_of
from supervised import APP, Supervised, begin, get

Lab = Callable[..., Supervised]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """`with lab(workers=2) as it:`; `app` is the source of the application, else the one above."""
    numbers = iter(range(9))

    def make(app: str = APP, port: int = 0, **settings: Any) -> Supervised:
        name = f"served_app{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(app))
        return Supervised(f"{name}:app", tmp_path, settings, entry="leanserve.worker.process:main", port=port)

    return make


def get_over(path: str) -> bytes:
    """The body over a unix socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(path)
        return exchange(sock)


def finish(sock: socket.socket) -> bytes:
    """All until the end."""
    with sock:
        whole = b""
        while data := sock.recv(65536):
            whole += data
    assert whole.startswith(b"HTTP/1.1 200"), whole
    return whole


def exchange(sock: socket.socket) -> bytes:
    sock.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    whole = b""
    while data := sock.recv(65536):
        whole += data
    return whole


# Boot


BROKEN = {
    "import": ("raise ValueError('no weights')", 3, "no weights"),
    "attribute": ("x = 1", 3, "app"),
    "lifespan": (
        """
        async def app(scope, receive, send):
            await receive()
            await send({"type": "lifespan.startup.failed", "message": "no disk"})
        """,
        3,
        "no disk",
    ),
    "long": ("raise ValueError('é' * 3_000_000)", 3, "ééé"),
    "exit": ("import sys; sys.exit(7)", 3, "7"),
    "signal": ("import os; os.kill(os.getpid(), 11)", 3, "SIGSEGV"),
    "os._exit": ("import os; os._exit(9)", 3, "exit code 9"),
}


def test_what_is_told_is_what_went_wrong_first() -> None:
    """And not that a loop cannot be closed, since it could not be opened."""
    first = OSError(24, "Too many open files")
    with pytest.raises(RuntimeError) as caught:  # noqa: PT012 - the order is what it is about
        try:
            raise first
        finally:
            raise RuntimeError("cannot close")
    assert _first_of(caught.value) is first
    with pytest.raises(LookupError) as meant:  # noqa: PT012
        try:
            int("x")
        except ValueError:
            raise LookupError("what was meant to be told") from None
    assert _first_of(meant.value) is meant.value


@pytest.mark.parametrize("name", list(BROKEN))
def test_an_application_that_cannot_start(lab: Lab, name: str) -> None:
    source, code, reason = BROKEN[name]
    with lab(source, workers=2, log_level="info") as it:
        assert it.running.wait(15) == code
    errors = it.lines("ERROR")
    assert len(errors) == 1, it.log
    assert reason in errors[0]
    assert len(errors[0]) < 3000
    assert "Traceback" not in it.log


@pytest.mark.parametrize(
    "source",
    [
        "import os, time; open('booting', 'a').close(); time.sleep(60)",
        """
        import asyncio
        async def app(scope, receive, send):
            open("booting", "a").close()
            await asyncio.sleep(60)
        """,
        """
        import time, signal
        signal.signal(signal.SIGTERM, lambda *_: None)
        open("booting", "a").close()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(1)
        """,
    ],
    ids=["import", "lifespan", "deaf"],
)
def test_sigterm_during_the_boot(lab: Lab, source: str) -> None:
    with lab(source, workers=2, drain_timeout=30) as it:
        wait_until((it.folder / "booting").exists, 10, "it boots")
        begun = time.monotonic()
        assert it.stop() == 0
        assert time.monotonic() - begun < 4


# Orders


def test_a_queue_is_emptied_when_the_whole_group_is_told_to_stop(lab: Lab) -> None:
    """systemd sends SIGTERM to all processes of the service: the workers' own must not come first."""
    with lab(workers=1) as it:
        it.wait_ready()
        first = begin(it.port, "/block?0.6")
        time.sleep(0.2)
        queued = [begin(it.port) for _ in range(5)]
        os.killpg(it.pid, signal.SIGTERM)
        for sock in [first, *queued]:
            finish(sock)
        assert it.wait_code() == 0


def test_a_worker_that_hears_of_the_stop_before_the_supervisor_does(lab: Lab) -> None:
    """It goes on accepting until it knows whether somebody comes after it."""
    with lab(workers=1) as it:
        it.wait_ready()
        slow = begin(it.port, "/wait?0.5")
        time.sleep(0.1)
        (worker,) = it.pids()
        os.kill(worker, signal.SIGTERM)
        time.sleep(0.02)
        later = [begin(it.port) for _ in range(5)]
        it.send(signal.SIGTERM)
        for sock in [slow, *later]:
            finish(sock)
        assert it.wait_code() == 0


def test_a_removed_worker_serves_its_queue(lab: Lab) -> None:
    with lab(workers=2) as it:
        it.wait_ready(2)
        blocking = [begin(it.port, "/block?0.3") for _ in range(8)]
        time.sleep(0.1)
        queued = [begin(it.port) for _ in range(24)]  # some of them with the one that has to go
        it.send(signal.SIGTTOU)
        for sock in [*blocking, *queued]:
            finish(sock)
        it.wait_log("has left")
        assert it.stop() == 0


def test_a_worker_that_is_told_alone_leaves_and_is_replaced(lab: Lab) -> None:
    with lab(workers=1) as it:
        it.wait_ready()
        pid = int(get(it.port))
        slow = begin(it.port, "/wait?0.5")
        time.sleep(0.1)
        os.kill(pid, signal.SIGTERM)
        assert finish(slow).endswith(str(pid).encode())
        it.wait_ready(2)
        assert int(get(it.port)) != pid
        assert it.stop() == 0


def test_other_signals_are_the_supervisors(lab: Lab) -> None:
    with lab() as it:
        it.wait_ready()
        pid = int(get(it.port))
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTTIN, signal.SIGTTOU):
            os.kill(pid, number)
        time.sleep(0.2)
        assert int(get(it.port)) == pid
        assert it.stop() == 0


def test_a_second_stop_cuts_a_request(lab: Lab) -> None:
    with lab(drain_timeout=60) as it:
        it.wait_ready()
        with begin(it.port, "/wait?60"):
            time.sleep(0.2)
            it.send(signal.SIGTERM)
            time.sleep(0.3)
            assert it.running.poll() is None
            begun = time.monotonic()
            assert it.stop() == 0
            assert time.monotonic() - begun < 6


def test_a_stuck_worker_is_killed(lab: Lab) -> None:
    with lab(drain_timeout=0.2, kill_grace=0.2, lifespan_shutdown_timeout=0) as it:
        it.wait_ready()
        with begin(it.port, "/block"):
            time.sleep(0.3)
            assert it.stop() == 0
    assert len(it.lines("did not leave in time")) == 1


def test_a_removed_worker_leaves_a_shared_unix_socket_alone(lab: Lab, tmp_path: Path) -> None:
    port, path = free_port(), str(tmp_path / "s")
    with lab(workers=2, bind=[f"127.0.0.1:{port}", f"unix:{path}"]) as it:
        it.wait_ready(2)
        it.send(signal.SIGTTOU)
        it.wait_log("has left")
        for _ in range(4):
            assert get_over(path).startswith(b"HTTP/1.1 200")
            assert get(port)
        assert it.stop() == 0
    assert not os.path.exists(path)


def test_an_inherited_socket_outlives_the_server(lab: Lab) -> None:
    """systemd's socket: not shut down by a removed worker, nor at the end."""
    with listening_socket() as shared:
        port = free_port()
        it = lab(workers=2, bind=[f"127.0.0.1:{port}", f"fd://{shared.fileno()}"])
        it.pass_fds = (shared.fileno(),)
        with it:
            it.wait_ready(2)
            assert get(shared.getsockname()[1])
            it.send(signal.SIGTTOU)
            it.wait_log("has left")
            for _ in range(4):
                assert get(port)
                assert get(shared.getsockname()[1])
            assert it.stop() == 0
        shared.settimeout(5)
        with socket.create_connection(shared.getsockname(), 5):
            shared.accept()[0].close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 5)


def test_a_full_worker_is_replaced_without_a_gap(lab: Lab) -> None:
    with lab(workers=1, limit_max_requests=15) as it:
        it.wait_ready()
        pids: set[int] = set()

        def enough() -> bool:
            pids.add(int(get(it.port)))
            return len(pids) >= 3

        wait_until(enough, 10, "two replacements")
        assert it.stop() == 0
    assert not it.lines("ERROR")


# The end of the parent


@pytest.mark.parametrize(
    ("path", "loop"),
    [("", "uvloop"), ("/wait?60", "uvloop"), ("/block", "asyncio"), ("/stuck", "uvloop")],
)
def test_orphans_go(lab: Lab, path: str, loop: str) -> None:
    """Whatever the application is busy with, and the port is free again."""
    with lab(workers=2, loop=loop, drain_timeout=60) as it:
        it.wait_ready(2)
        workers = it.pids()
        busy = [begin(it.port, path) for _ in range(6)] if path else []
        time.sleep(0.2)
        begun = time.monotonic()
        it.running.kill()
        wait_until(lambda: not any(map(alive, workers)), 5, "the workers are gone")
        assert time.monotonic() - begun < 4
        for sock in busy:
            sock.close()
        with lab(workers=1, port=it.port) as again:
            again.wait_ready()
            assert again.stop() == 0


def test_an_orphan_that_boots_goes_at_once(lab: Lab) -> None:
    with lab("import time; open('booting', 'a').close(); time.sleep(60)") as it:
        wait_until((it.folder / "booting").exists, 10, "it boots")
        workers = it.pids()
        it.running.kill()
        wait_until(lambda: not any(map(alive, workers)), 3, "it is gone")


# Start methods


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_start_methods(lab: Lab, method: str) -> None:
    """And a second server takes the port over while connections of the first are in TIME_WAIT."""
    port = free_port()
    for _ in range(2):
        with lab(workers=2, start_method=method, port=port) as it:
            it.wait_ready(2)
            for _ in range(5):
                assert get(port)
            victim = int(get(port))
            os.kill(victim, signal.SIGKILL)
            it.wait_ready(3)
            assert get(port)
            assert it.stop() == 0


def test_orphans_cut_no_request_that_came_late(tmp_path: Path) -> None:
    """When the supervisor is killed, who is idle may still bring a request, but not in the last moment."""
    (tmp_path / "app.py").write_text(APP)
    settings = {"workers": 2, "drain_idle_timeout": 1.0}
    with Supervised("app:app", tmp_path, settings, entry="leanserve.worker.process:main") as server:
        server.wait_ready(2)
        clients = [socket.create_connection(("127.0.0.1", server.port), 15) for _ in range(60)]
        answers = []
        os.kill(server.pid, signal.SIGKILL)
        for client in clients:  # within 0.6 seconds and more: some come when the time is over
            time.sleep(0.01)
            with contextlib.suppress(OSError):
                client.sendall(b"GET /wait?0.03 HTTP/1.1\r\nhost: a\r\n\r\n")
        for client in clients:
            with client, contextlib.suppress(OSError):
                client.settimeout(15)
                answers.append(client.recv(1000)[:12])
        assert set(answers) <= {b"HTTP/1.1 200", b""}
        assert answers.count(b"HTTP/1.1 200") > 5
