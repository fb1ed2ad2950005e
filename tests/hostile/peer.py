"""One hostile connection, by hand; and crowds of them."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType

_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
ANSWER_WITHIN_S = 30.0
HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nhost: a.example\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n"
)


@dataclass(frozen=True, slots=True)
class Target:
    """Where to, and for how long at most: no attack goes on without end."""

    port: int
    hold_s: float = 10.0


@dataclass
class Outcomes:
    """What became of the connections of an attack.

    Attributes:
        counts: by what the peer saw last: a status, "closed", "reset", "held" (by the server, until the end).
        longest_s: the longest that the server left one of them open.
        held: set when all connections stand.
    """

    counts: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    held: asyncio.Event = field(default_factory=asyncio.Event)


class Peer:
    """A plain socket in the running loop; a context manager that resets unless told otherwise."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.begun_s = time.monotonic()
        self.received = bytearray()
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(cls, target: Target, *, receive_buffer: int = 0) -> Peer:
        """Connect. `receive_buffer`: bytes that the kernel takes unread."""
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", target.port))
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    async def __aenter__(self) -> Peer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.sock.fileno() >= 0:
            self.reset()

    @property
    def age_s(self) -> float:
        """Since it stands."""
        return time.monotonic() - self.begun_s

    async def send(self, data: bytes) -> None:
        """All of it. OSError when the server has closed."""
        await self._loop.sock_sendall(self.sock, data)

    async def read(self, size: int = 65536) -> bytes:
        """What comes next; b"" at the end."""
        return await self._loop.sock_recv(self.sock, size)

    def reset(self) -> None:
        """RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        """FIN."""
        self.sock.close()

    async def outcome(self, within_s: float = ANSWER_WITHIN_S) -> str:
        """Read until the server closes, or until the time is over: what is to be said of it."""
        end = "held"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                try:
                    while data := await self.read():
                        if len(self.received) < 65536:
                            self.received += data
                    end = "closed"
                except OSError:
                    end = "reset"
        return self._said(end)

    def _said(self, end: str) -> str:
        status = _STATUS.match(self.received)
        return status[1].decode() if status and end != "held" else end

    async def shake(self, *lines: bytes) -> None:
        """The handshake of WebSocket. ConnectionError when it fails."""
        await self.send(HANDSHAKE + b"".join(line + b"\r\n" for line in lines) + b"\r\n")
        while b"\r\n\r\n" not in self.received:
            data = await self.read()
            if not data:
                raise ConnectionError("closed in the handshake")
            self.received += data
        if not self.received.startswith(b"HTTP/1.1 101 "):
            raise ConnectionError(repr(bytes(self.received[:60])))
        del self.received[: self.received.index(b"\r\n\r\n") + 4]


async def crowd(
    outcomes: Outcomes, count: int, at_once: int, one: Callable[[int], Awaitable[str]]
) -> None:
    """`count` calls of `one`, so many at a time; their results are counted."""
    numbers = iter(range(count))

    async def several() -> None:
        for number in numbers:
            try:
                outcomes.counts[await one(number)] += 1
            except OSError as error:
                outcomes.counts[type(error).__name__] += 1

    await asyncio.gather(*(several() for _ in range(min(at_once, count))))


async def pour(target: Target, opening: bytes, piece: bytes, most_bytes: int) -> str:
    """Send the opening, and then pieces until the server has answered; "taken" when it takes all of them."""
    async with await Peer.open(target) as peer:
        answer = asyncio.ensure_future(peer.outcome())
        sent = 0
        try:
            await peer.send(opening)
            while sent < most_bytes and not answer.done() and not peer.received:
                await peer.send(piece)
                sent += len(piece)
                await asyncio.sleep(0)
            if sent >= most_bytes and not peer.received:
                answer.cancel()
                return "taken"
            peer.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # refused, and closed before all was sent
        return await answer
