"""leanserve.supervisor.queues: what waits in the kernel while nobody accepts."""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from harness import free_port, wait_until
from leanserve.listeners import Listeners, open_listeners
from leanserve.settings import ListenSettings
from leanserve.supervisor.queues import measure
from supervised import APP, Supervised, begin, get

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel does not say")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def opened(stack: ExitStack, slots: int, **listen: object) -> Listeners:
    listeners = open_listeners(ListenSettings(**listen), slots)
    stack.callback(listeners.close)
    return listeners


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_queue_per_worker(stack: ExitStack, host: str) -> None:
    listeners = opened(stack, 2, host=host, port=0, accept="per-worker")
    assert measure(listeners, 2) == []  # nothing listens yet
    for slot in range(2):
        listeners.sockets(slot)[0].listen(7)
    address = listeners.sockets(0)[0].getsockname()
    for _ in range(5):
        stack.enter_context(socket.create_connection(address[:2], 5))
    name = f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
    wait_until(lambda: sum(each["queued"] for each in measure(listeners, 2)) == 5, 5, "all are queued")
    found = measure(listeners, 2)
    assert [(each["listener"], each["worker"], each["backlog"]) for each in found] == [
        (name, 1, 7), (name, 2, 7),
    ]  # fmt: skip
    for slot in range(2):
        for _ in range(found[slot]["queued"]):
            listeners.sockets(slot)[0].accept()[0].close()
    assert [each["queued"] for each in measure(listeners, 2)] == [0, 0]


def test_one_that_all_share_is_told_once(stack: ExitStack, tmp_path: Path) -> None:
    listeners = opened(
        stack, 3, bind=("127.0.0.1:0", f"unix:{tmp_path / 's'}"), accept="shared"
    )
    for sock in listeners.sockets(0):
        sock.listen(5)
    (found,) = measure(listeners, 3)  # of the unix socket nothing is known
    assert (found["worker"], found["queued"], found["backlog"]) == (0, 0, 5)


def test_told_while_no_loop_moves(tmp_path: Path) -> None:
    """Of a server whose only worker is stuck; and the supervisor has no log full of questions."""
    (tmp_path / "served_app.py").write_text(APP)
    admin = free_port()
    settings = {"admin": f"127.0.0.1:{admin}", "log_level": "info"}
    with Supervised(
        "served_app:app", tmp_path, settings, entry="leanserve.worker.process:main"
    ) as it, ExitStack() as stack:
        it.wait_ready(1)
        stuck = stack.enter_context(begin(it.port, "/block"))
        del stuck
        # Those that come before it is stuck are accepted: enough to see some that are not.
        for _ in range(20):
            stack.enter_context(begin(it.port, "/"))

        def queued() -> int:
            (each,) = json.loads(get(admin, "/status"))["accept_queues"]
            assert each["listener"] == f"127.0.0.1:{it.port}"
            return int(each["queued"])

        wait_until(lambda: queued() > 0, 15, "connections that nobody accepts")
        metric = f'leanserve_accept_queue{{listener="127.0.0.1:{it.port}",worker="1"}} '
        assert metric in get(admin, "/metrics").decode()
        assert "order: queues" not in it.log
        assert it.stop(signal.SIGQUIT) == 0
