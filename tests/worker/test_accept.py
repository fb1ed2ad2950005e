"""leanserve.worker.accept: ceasing to accept without losing a connection that got through."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from typing import Any

import pytest

from leanserve.settings import Settings
from leanserve.worker.accept import Acceptor
from served import CLOSING_GET, Client, hello, listener, run, serving


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Greeter(asyncio.Protocol):
    """Says hello and closes."""

    made = 0

    def connection_made(self, transport: Any) -> None:
        type(self).made += 1
        transport.write(b"hello")
        transport.close()


def refused(sock: socket.socket, seconds: float = 3.0) -> bool:
    """Whether a new client is refused (or gets no answer) instead of accepted."""
    with socket.socket(sock.family, socket.SOCK_STREAM) as probe:
        probe.settimeout(seconds)
        try:
            probe.connect(sock.getsockname())
        except OSError:
            return True
        return False


FAMILIES = [
    pytest.param(socket.AF_INET, "127.0.0.1", id="ipv4"),
    pytest.param(socket.AF_INET6, "::1", id="ipv6"),
    pytest.param(socket.AF_UNIX, "", id="unix"),
]


def bound(family: int, host: str, folder: Any) -> socket.socket:
    return listener(family, str(folder / "sock") if family == socket.AF_UNIX else (host, 0))


@pytest.mark.parametrize(("family", "host"), FAMILIES)
def test_who_got_through_is_served_and_who_comes_later_is_not(
    loop: str, family: int, host: str, tmp_path: Any
) -> None:
    async def main() -> None:
        with bound(family, host, tmp_path) as sock:
            acceptor = Acceptor(Greeter, Settings(), [sock], None)
            await acceptor.open()
            # Connected in the kernel; the loop had no turn to accept them.
            clients = [connected(sock) for _ in range(30)]
            await acceptor.close()
            await asyncio.sleep(0.05)
            for client in clients:
                client.settimeout(5)
                assert client.recv(100) == b"hello"
                client.close()
            assert await asyncio.get_running_loop().run_in_executor(None, refused, sock)

    run(loop, main)


def connected(sock: socket.socket) -> socket.socket:
    client = socket.socket(sock.family)
    client.connect(sock.getsockname())
    return client


def test_pause_leaves_the_queue_to_the_next(loop: str) -> None:
    """keep_listeners: the kernel goes on queueing, and a successor accepts."""

    async def main() -> None:
        with listener() as sock:
            first = Acceptor(Greeter, Settings(), [sock], None)
            await first.open()
            first.pause()
            await asyncio.sleep(0.01)
            client = socket.create_connection(sock.getsockname())
            client.settimeout(0.1)
            with pytest.raises(TimeoutError):
                client.recv(100)
            second = Acceptor(Greeter, Settings(), [sock], None)
            await second.open()
            client.setblocking(False)
            assert await asyncio.get_running_loop().sock_recv(client, 100) == b"hello"
            client.close()
            await second.close()

    run(loop, main)


def test_clients_that_connect_all_the_time(loop: str) -> None:
    """Whoever's connect() succeeded is answered, right through the close; nobody is reset."""

    async def main() -> None:
        async with serving(hello, drain_idle_timeout=0.3) as worker:
            results: list[str] = []
            stop = asyncio.Event()

            async def knock() -> None:
                while not stop.is_set():
                    try:
                        async with asyncio.timeout(0.5):
                            client = await Client.open(worker)
                    except (OSError, TimeoutError):
                        results.append("refused")
                        await asyncio.sleep(0.01)
                        continue
                    async with client:
                        await client.send(CLOSING_GET)
                        (response,) = await client.read_all()
                        results.append(response.body.decode())

            tasks = [asyncio.ensure_future(knock()) for _ in range(20)]
            await asyncio.sleep(0.2)
            await worker.drain()
            stop.set()
            await asyncio.gather(*tasks)
            assert results.count("hello") > 20
            assert set(results) <= {"hello", "refused"}

    run(loop, main)


@pytest.mark.skipif(sys.platform != "linux", reason="the filter is Linux's")
def test_a_listener_of_a_closed_worker_is_still_its_owners(loop: str) -> None:
    async def main() -> None:
        with listener() as sock:
            acceptor = Acceptor(Greeter, Settings(), [sock], None)
            await acceptor.open()
            await acceptor.close()
            await acceptor.close()
            assert sock.fileno() >= 0
            assert sock.getsockname()[1]

    run(loop, main)


def test_a_client_that_left_the_queue(loop: str) -> None:
    async def main() -> None:
        with listener() as sock:
            acceptor = Acceptor(Greeter, Settings(), [sock], None)
            await acceptor.open()
            for _ in range(5):
                client = socket.create_connection(sock.getsockname())
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                client.close()
            with contextlib.closing(socket.create_connection(sock.getsockname())) as client:
                await acceptor.close()
                client.setblocking(False)
                assert await asyncio.get_running_loop().sock_recv(client, 100) == b"hello"

    run(loop, main)
