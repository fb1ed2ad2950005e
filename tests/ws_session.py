"""A WebSocket exchange on a real connection, over the fakes of loop and transport."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fakes import FakeService
from leanserve.asgi.messages import ExchangeRecord
from leanserve.asgi.websocket import WebSocketExchange
from leanserve.protocol.events import Request
from leanserve.settings import Settings
from leanserve.transport.connection import Connection
from ws_frames import parse

HANDSHAKE = (
    b"GET /ws/%C3%BC?q=1 HTTP/1.1\r\nhost: a.example\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n"
)


class _Service(FakeService):
    def open_exchange(self, connection: Connection, request: Request) -> Any:
        exchange = WebSocketExchange(self, connection, request, self.app)
        self.exchanges.append(exchange)
        self.running.add(exchange)
        return exchange


class Session:
    """One client, and the server's side of it."""

    def __init__(self, app: Any, settings: Settings, kernel_bytes: int) -> None:
        self.service = _Service(app, settings)
        self.service.state["model"] = "m"
        self.loop = self.service.loop
        self.connection, self.transport = self.service.connect(kernel_bytes=kernel_bytes)

    @property
    def exchange(self) -> WebSocketExchange:
        """The one exchange."""
        (exchange,) = self.service.exchanges
        assert isinstance(exchange, WebSocketExchange)
        return exchange

    @property
    def record(self) -> ExchangeRecord:
        """The one record of the one exchange."""
        (record,) = self.service.records
        return record

    def settle(self) -> None:
        """Let everything run that can run now."""
        for _ in range(4):
            self.loop.run()

    def feed(self, data: bytes) -> None:
        """Bytes of the client arrive."""
        self.transport.feed(data)
        self.settle()

    def shake(self, *lines: bytes, behind: bytes = b"") -> None:
        """The handshake arrives."""
        self.feed(HANDSHAKE + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + behind)

    def eof(self) -> None:
        """The client closes its side."""
        self.transport.feed_eof()
        self.settle()

    def lose(self) -> None:
        """The connection breaks."""
        self.transport.feed_reset()
        self.settle()

    def pass_time(self, seconds: float) -> None:
        """Time passes."""
        self.loop.pass_time(seconds)
        self.settle()

    def head(self) -> bytes:
        """Status line and headers of the answer, headers in lower case."""
        head, _, _ = self.transport.wire.partition(b"\r\n\r\n")
        line, _, rest = head.partition(b"\r\n")
        return line + b"\r\n" + rest.lower()

    def body(self) -> bytes:
        """What stands behind the head."""
        return self.transport.wire.partition(b"\r\n\r\n")[2]

    def frames(self) -> list[tuple[int, bytes]]:
        """(opcode, payload) of all frames sent."""
        return [(opcode, payload) for opcode, _, payload in parse(self.body())]


@contextmanager
def session(app: Any, *, kernel_bytes: int = 1 << 20, **settings: Any) -> Iterator[Session]:
    """A session whose application has ended, and has met no bug of ours, when the block has."""
    made = Session(app, Settings.build(**settings), kernel_bytes)
    try:
        yield made
        made.lose()
        if made.service.exchanges and not made.exchange.task.done():
            made.exchange.task.cancel()
            made.settle()
        assert not made.service.running
        assert not made.service.exchanges or made.exchange.task.exception() is None
    finally:
        made.loop.close()
    assert made.service.failures == []
    assert made.loop.problems == []
