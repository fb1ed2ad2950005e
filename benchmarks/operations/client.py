"""Connections of the load generators: a plain protocol on uvloop, one request at a time on each."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

ANSWER_WITHIN_S = 10.0
_HOST = b"Host: 127.0.0.1\r\n"
_PRIORITY = -10
_BIND_WITHOUT_PORT = 24  # IP_BIND_ADDRESS_NO_PORT (linux/in.h): the port is chosen by connect()


class Ended(Exception):
    """The connection ended before the answer did.

    Attributes:
        begun: whether a byte of the answer had come.
        reset: whether it was reset, and not closed.
    """

    def __init__(self, begun: bool, reset: bool) -> None:
        super().__init__(f"{'reset' if reset else 'closed'}, {'within' if begun else 'before'} the answer")
        self.begun, self.reset = begun, reset


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole response; the header block in lower case."""

    status: int
    head: bytes
    body: bytes

    @property
    def pid(self) -> int:
        """The process that gave it; 0 when it does not say."""
        _, _, rest = self.head.partition(b"\r\nx-pid: ")
        return int(rest.split(b"\r\n")[0] or 0)

    @property
    def last(self) -> bool:
        """Whether the server closes behind it."""
        return b"\r\nconnection: close" in self.head


class Link(asyncio.Protocol):
    """One connection. `address` is our own; `ended` is set when it is over."""

    def __init__(self) -> None:
        self.address = ("", 0)
        self.ended = asyncio.Event()
        self.reset = False
        self._transport: asyncio.Transport | None = None
        self._data = bytearray()
        self._waiter: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self.address = transport.get_extra_info("sockname")

    def data_received(self, data: bytes) -> None:
        self._data += data
        waiter = self._waiter
        if waiter is not None and not waiter.done() and (answer := self._complete()):
            waiter.set_result(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self.reset = exc is not None
        self.ended.set()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(Ended(bool(self._data), self.reset))

    def _complete(self) -> Answer | None:
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            return None
        head = bytes(self._data[:end]).lower() + b"\r\n"
        _, _, rest = head.partition(b"\r\ncontent-length: ")
        size = int(rest.split(b"\r\n")[0] or 0)
        if len(self._data) < end + 4 + size:
            return None
        body = bytes(self._data[end + 4 : end + 4 + size])
        del self._data[: end + 4 + size]
        return Answer(int(head[9:12]), head, body)

    async def ask(self, request: bytes, within_s: float = ANSWER_WITHIN_S) -> Answer:
        """Send, and wait for the whole answer. Ended or TimeoutError when there is none."""
        assert self._transport is not None
        self._waiter = asyncio.get_running_loop().create_future()
        if self.ended.is_set():
            raise Ended(False, self.reset)
        self._transport.write(request)
        try:
            async with asyncio.timeout(within_s):
                return await self._waiter
        finally:
            self._waiter = None

    def close(self) -> None:
        """Close our side; a FIN."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Reset it."""
        if self._transport is not None:
            sock = self._transport.get_extra_info("socket")
            with contextlib.suppress(OSError):  # it has ended
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self._transport.abort()


async def connect(port: int, source: tuple[str, int] | None = None, receive_buffer: int = 0) -> Link:
    """A connection to 127.0.0.1, from `source` (port 0: any). OSError or TimeoutError."""
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if source is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if not source[1]:
                sock.setsockopt(socket.SOL_IP, _BIND_WITHOUT_PORT, 1)
            sock.bind(source)
        async with asyncio.timeout(ANSWER_WITHIN_S):
            await loop.sock_connect(sock, ("127.0.0.1", port))
        return (await loop.create_connection(Link, sock=sock))[1]
    except BaseException:
        sock.close()
        raise


def get(target: str, *, close: bool = False) -> bytes:
    """A GET."""
    end = b"Connection: close\r\n\r\n" if close else b"\r\n"
    return b"GET %s HTTP/1.1\r\n" % target.encode() + _HOST + end


def post(target: str, body: bytes, *, close: bool = False) -> bytes:
    """A POST."""
    end = b"Connection: close\r\n\r\n" if close else b"\r\n"
    line = b"POST %s HTTP/1.1\r\n" % target.encode()
    return line + _HOST + b"Content-Length: %d\r\n" % len(body) + end + body


async def once(port: int, target: str, within_s: float = ANSWER_WITHIN_S) -> Answer:
    """A GET on a connection of its own."""
    link = await connect(port)
    try:
        return await link.ask(get(target, close=True), within_s)
    finally:
        link.close()


@contextlib.contextmanager
def first_in_line() -> Iterator[None]:
    """The client of a latency before all others at the CPU, without pauses of its collector.

    Set once the servers run, or they would inherit it. Without the right to it, nothing changes.
    """
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, _PRIORITY)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, before)


def raise_descriptors() -> None:
    """As many descriptors as the kernel lets us and what we start have."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
