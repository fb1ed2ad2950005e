"""leanserve.transport.hangup: resets of peers from whom nothing is read; and platforms without epoll."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
import subprocess
import sys
from typing import Any

import pytest

from leanserve.transport.hangup import HangupWatch, make_watch
from served import LOOPS, eventually, run

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="needs epoll")

NO_EPOLL = """
import select, sys
del select.epoll
sys.modules["fcntl"] = sys.modules["termios"] = None  # as on Windows
import asyncio, http.client, threading
from leanserve import Server
from leanserve.transport import flow, hangup

ended = []

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    try:
        while True:
            await send({"type": "http.response.body", "body": bytes(50_000), "more_body": True})
            await asyncio.sleep(0.01)
    except asyncio.CancelledError as error:
        ended.append(error.args)
        raise

assert flow._TIOCOUTQ is None
assert hangup.make_watch(None) is None
with Server(app, port=0, send_timeout=0.3) as server:
    clients = [http.client.HTTPConnection(*server.addresses[0][:2]) for _ in range(2)]
    for client in clients:
        client.request("GET", "/")
    clients[0].close()
    for _ in range(500):
        if len(ended) == 2:
            break
        threading.Event().wait(0.01)
    print(sorted(ended))
"""


def test_without_epoll() -> None:
    """A reset and a reader that stops are found all the same, by the writes."""
    done = subprocess.run([sys.executable, "-c", NO_EPOLL], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[('client_gone',), ('slow_reader',)]\n", done.stderr


class Watched:
    """One end of a connection, as far as the watch knows it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.transport: Any = self
        self.told = self.ends = 0

    def get_extra_info(self, name: str) -> socket.socket:
        return self.sock

    def hung_up(self) -> None:
        self.told += 1

    def half_closed(self) -> None:
        self.ends += 1


def pair() -> tuple[Watched, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        return Watched(server.accept()[0]), client


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_reset_is_told_once_and_an_end_is_not(loop: str) -> None:
    async def main() -> None:
        watch = make_watch(asyncio.get_running_loop())
        assert isinstance(watch, HangupWatch)
        (one, first), (other, second) = pair(), pair()
        for it in (one, other, one):
            watch.watch(it)
        second.shutdown(socket.SHUT_WR)
        reset(first)
        await eventually(lambda: one.told)
        await asyncio.sleep(0.05)
        assert (one.told, other.told) == (1, 0)
        watch.forget(other)
        reset(second)
        await asyncio.sleep(0.05)
        assert (one.told, other.told) == (1, 0)
        watch.close()
        for it in (one, other):
            it.sock.close()

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_end_is_told_to_who_asks_for_it_and_a_reset_behind_it_all_the_same(loop: str) -> None:
    async def main() -> None:
        watch = make_watch(asyncio.get_running_loop())
        assert watch is not None
        one, client = pair()
        watch.watch(one, end=True)
        client.send(b"unread")
        await asyncio.sleep(0.05)
        assert (one.told, one.ends) == (0, 0)
        client.shutdown(socket.SHUT_WR)
        await eventually(lambda: one.ends)
        await asyncio.sleep(0.05)
        assert (one.told, one.ends) == (0, 1)
        reset(client)
        await eventually(lambda: one.told)
        assert (one.told, one.ends) == (1, 1)
        watch.close()
        one.sock.close()

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_number_that_another_connection_has_got(loop: str) -> None:
    """The first is closed before it is forgotten: its descriptor is the other's by then."""

    async def main() -> None:
        watch = make_watch(asyncio.get_running_loop())
        assert watch is not None
        (one, first), (other, second) = pair(), pair()
        watch.watch(one)
        number = one.sock.fileno()
        one.sock.close()
        moved = socket.socket(fileno=other.sock.detach())
        other.sock = socket.socket(fileno=os.dup2(moved.fileno(), number))
        moved.close()
        watch.watch(other)
        watch.forget(one)
        reset(second)
        await eventually(lambda: other.told)
        assert (one.told, other.told) == (0, 1)
        watch.close()
        other.sock.close()
        first.close()

    run(loop, main)
