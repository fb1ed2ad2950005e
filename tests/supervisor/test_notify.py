"""What the service manager is told, and when: over a real datagram socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from math import inf
from pathlib import Path

import pytest

from leanserve.supervisor.notify import Notifier
from leanserve.supervisor.states import SupervisorState

BOOTING, RUNNING, ROLLING, STOPPING = list(SupervisorState)[:4]


class Socket:
    """Where a manager listens."""

    def __init__(self, address: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(address)
        self.sock.setblocking(False)

    def take(self) -> list[list[str]]:
        """The messages that have come, each as its lines."""
        found = []
        while True:
            try:
                found.append(self.sock.recv(65536).decode().split("\n"))
            except BlockingIOError:
                return found


@pytest.fixture(params=["path", "abstract"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Socket, dict[str, str]]]:
    """The socket, and the environment that names it."""
    name = str(tmp_path / "notify") if request.param == "path" else f"\0leanserve-{os.getpid()}"
    manager = Socket(name)
    yield manager, {"NOTIFY_SOCKET": name.replace("\0", "@")}
    manager.sock.close()


Place = tuple[Socket, dict[str, str]]


def test_a_life(place: Place) -> None:
    manager, environment = place
    notifier = Notifier(environment)
    notifier.look(BOOTING, 0, 2, 10.0)
    assert manager.take() == [["STATUS=booting, 0 of 2 workers ready", "EXTEND_TIMEOUT_USEC=60000000"]]
    notifier.look(BOOTING, 0, 2, 11.0)
    assert manager.take() == []
    assert notifier.next_s == 25.0
    notifier.look(BOOTING, 0, 2, 25.0)
    assert manager.take() == [["EXTEND_TIMEOUT_USEC=60000000"]]
    notifier.look(RUNNING, 1, 2, 26.0)
    assert manager.take() == [["READY=1", "STATUS=running, 1 of 2 workers ready"]]
    assert notifier.next_s == inf
    notifier.look(RUNNING, 2, 2, 27.0)
    assert manager.take() == [["STATUS=running, 2 of 2 workers ready"]]
    notifier.look(STOPPING, 2, 2, 50.0)
    assert manager.take() == [
        ["STOPPING=1", "STATUS=stopping, 2 of 2 workers ready", "EXTEND_TIMEOUT_USEC=60000000"]
    ]
    notifier.look(STOPPING, 2, 2, 51.0)
    assert manager.take() == []


def test_a_reload(place: Place) -> None:
    """RELOADING=1 at SIGHUP, with the time; READY=1 when it is over, and not when workers are recycled."""
    manager, environment = place
    notifier = Notifier(environment)
    notifier.look(RUNNING, 1, 1, 1.0)
    notifier.look(ROLLING, 1, 1, 2.0)
    notifier.look(RUNNING, 1, 1, 3.0)
    assert sum("READY=1" in lines for lines in manager.take()) == 1
    notifier.reloading()
    ((reloading, moment),) = manager.take()
    assert reloading == "RELOADING=1"
    assert moment.startswith("MONOTONIC_USEC=")
    assert int(moment.partition("=")[2]) > 0
    notifier.look(ROLLING, 1, 1, 4.0)
    assert manager.take()[0][-1] == "EXTEND_TIMEOUT_USEC=60000000"
    notifier.look(RUNNING, 1, 1, 5.0)
    assert manager.take()[0][0] == "READY=1"
    notifier.reloading()  # one that is refused is over at once
    notifier.look(RUNNING, 1, 1, 6.0)
    assert manager.take()[1][0] == "READY=1"


def test_signs_of_life(place: Place) -> None:
    manager, environment = place
    notifier = Notifier({**environment, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())})
    notifier.look(RUNNING, 1, 1, 100.0)
    assert manager.take()[0][-1] == "WATCHDOG=1"
    assert notifier.next_s == 101.5
    notifier.look(RUNNING, 1, 1, 101.4)
    assert manager.take() == []
    notifier.look(RUNNING, 1, 1, 101.5)
    assert manager.take() == [["WATCHDOG=1"]]


@pytest.mark.parametrize(
    "more", [{"WATCHDOG_USEC": "9", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "0"}]
)
def test_no_signs_of_life_that_are_not_for_us(place: Place, more: dict[str, str]) -> None:
    manager, environment = place
    notifier = Notifier({**environment, **more})
    notifier.look(RUNNING, 1, 1, 1.0)
    assert manager.take() == [["READY=1", "STATUS=running, 1 of 1 workers ready"]]
    assert notifier.next_s == inf


def test_while_another_one_speaks(place: Place) -> None:
    manager, environment = place
    notifier = Notifier({**environment, "WATCHDOG_USEC": "3000000"})
    notifier.muted = True
    notifier.look(RUNNING, 1, 1, 1.0)
    notifier.tell("STOPPING=1")
    assert manager.take() == []
    assert notifier.next_s == inf
    notifier.muted = False
    assert notifier.next_s < 1.0
    notifier.look(RUNNING, 1, 1, 2.0)
    assert manager.take() == [["READY=1", "STATUS=running, 1 of 1 workers ready", "WATCHDOG=1"]]


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": "/nosuch/socket", "WATCHDOG_USEC": "10"}])
def test_without_a_manager(environment: dict[str, str]) -> None:
    notifier = Notifier(environment)
    notifier.look(RUNNING, 1, 1, 1.0)
    notifier.reloading()
    assert (notifier.next_s == inf) is (not environment)
