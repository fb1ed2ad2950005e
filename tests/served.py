"""A worker in this process, on real sockets, with either event loop; and a client that does as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import uvloop

from leanserve.settings import Settings
from leanserve.worker.worker import Worker
from wire import Response, parse

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
GET = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
CLOSING_GET = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"


def run(loop: str, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `main` in a new loop of this kind; what the loop has to complain of is an error."""
    problems: list[dict[str, Any]] = []
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.get_loop().set_exception_handler(lambda _loop, context: problems.append(context))
        runner.run(main())
    assert not problems, problems


def listener(family: int = socket.AF_INET, address: Any = ("127.0.0.1", 0)) -> socket.socket:
    """A bound socket that does not listen yet."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.bind(address)
    sock.setblocking(False)
    return sock


@asynccontextmanager
async def serving(app: Any, *listeners: socket.socket, **flat: Any) -> AsyncIterator[Worker]:
    """A worker that serves `app`; it drains in a hurry at the end."""
    extra = {name: flat.pop(name) for name in ("on_full", "lane") if name in flat}
    socks = listeners or (listener(),)
    worker = Worker(app, Settings.build(**{"access_log": False, "stall_limit": None, **flat}), socks, **extra)
    try:
        await worker.start()
        try:
            yield worker
        finally:
            if not worker.draining:
                worker.hurry()
                await worker.drain()
            assert not worker.connections
            assert not worker.running
    finally:
        for sock in socks:
            sock.close()


class Client:
    """One connection to `worker`, by hand."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = bytearray()
        self.ended = False
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(cls, worker: Worker, *, receive_buffer: int = 0) -> Client:
        first = worker.listeners[0]
        sock = socket.socket(first.family, socket.SOCK_STREAM)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, first.getsockname())
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.sock.close()

    async def send(self, *pieces: bytes, pause: float = 0.0) -> None:
        for piece in pieces:
            await self._loop.sock_sendall(self.sock, piece)
            if pause:
                await asyncio.sleep(pause)

    def shut(self) -> None:
        """FIN."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    async def read(self, size: int = 1 << 18) -> bytes:
        """What comes next; b"" at the end."""
        async with asyncio.timeout(20):
            data = await self._loop.sock_recv(self.sock, size)
        self.received += data
        self.ended = self.ended or not data
        return data

    async def read_all(self, *methods: bytes) -> list[Response]:
        """Everything until the end of the connection. Raises ConnectionResetError on a reset."""
        while await self.read():
            pass
        return parse(bytes(self.received), methods or [b"GET"] * 9, ended=True)

    async def read_one(self, method: bytes = b"GET") -> Response:
        """One response; the connection stays."""
        while True:
            found = parse(bytes(self.received), [method] + [b"GET"] * 99)
            if found and found[0].complete:
                self.received.clear()
                assert len(found) == 1
                return found[0]
            if not await self.read():
                raise ConnectionError(f"ended: {bytes(self.received)!r}")

    async def closes_within(self, seconds: float) -> bool:
        """Whether the server closes (or resets) in time."""
        try:
            async with asyncio.timeout(seconds):
                with contextlib.suppress(ConnectionResetError):
                    while await self._loop.sock_recv(self.sock, 65536):
                        pass
            return True
        except TimeoutError:
            return False


async def fetch(worker: Worker, *requests: bytes) -> list[Response]:
    """Send all at once, read until the server closes."""
    async with await Client.open(worker) as client:
        await client.send(b"".join(requests))
        return await client.read_all(*(request.partition(b" ")[0] for request in requests))


async def eventually(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def tls_client(
    worker: Worker, context: ssl.SSLContext, name: str = "localhost"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream pair over TLS."""
    host, port = worker.listeners[0].getsockname()[:2]
    return await asyncio.open_connection(host, port, ssl=context, server_hostname=name)


async def hello(scope: Any, receive: Any, send: Any) -> None:
    """The smallest application."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})
