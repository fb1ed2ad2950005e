"""What stands around a connection: the exchange or tunnel above it, and the service beside it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from leanserve.errors import RemoteProtocolError
from leanserve.protocol.events import Request
from leanserve.protocol.responses import DefaultHeaders
from leanserve.settings import Settings
from leanserve.transport.deadlines import Deadlines
from leanserve.transport.hangup import HangupWatch

if TYPE_CHECKING:
    from leanserve.protocol.fastpath import Recogniser, ResponseEncoder
    from leanserve.transport.closing import ClosingConnection
    from leanserve.transport.connection import Connection

__all__ = ["Exchange", "Service", "Tunnel"]


class Exchange(Protocol):
    """What a connection tells of one request and its response."""

    def body_received(self, data: bytes) -> None:
        """Bytes of the request body."""

    def body_ended(self) -> None:
        """The request is complete."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, or the request broke off."""

    def drain(self) -> None:
        """The server has begun to stop."""

    def cancel(self, reason: str) -> None:
        """The server does not wait any longer."""


class Tunnel(Protocol):
    """What a connection tells once its bytes are another protocol's."""

    def data_received(self, data: bytes) -> None:
        """Bytes from the peer."""

    def eof_received(self) -> None:
        """The peer has closed its side."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""

    def deadline_reached(self) -> None:
        """The deadline set by ``Connection.set_deadline`` has passed."""

    def drain(self) -> None:
        """The server has begun to stop."""

    def cancel(self, reason: str) -> None:
        """The server does not wait any longer."""


class Service(Protocol):
    """What all connections of a worker share; the worker is it."""

    settings: Settings
    loop: asyncio.AbstractEventLoop
    deadlines: Deadlines
    #: None where the platform has no epoll.
    hangups: HangupWatch | None
    server_cert: str | None
    recogniser: Recogniser | None
    encoder: ResponseEncoder | None
    #: ``date``, ``server`` and the operator's own headers.
    default_headers: DefaultHeaders
    #: Whether the server has begun to stop.
    draining: bool
    #: Monotonic seconds, from when on an answer may wait for the next one; connections move it.
    holds_from_s: float
    #: Whether a request is refused for the number of application calls that have not ended.
    limits_running: bool

    def open_exchange(self, connection: Connection, request: Request) -> Exchange:
        """Begin an exchange. Raises RemoteProtocolError when the request is refused after all."""

    def connection_opened(self, connection: Connection) -> None:
        """A connection was accepted (behind the TLS handshake)."""

    def connection_closed(self, connection: Connection) -> None:
        """A connection is gone."""

    def refused(self, connection: ClosingConnection, error: RemoteProtocolError) -> None:
        """The peer broke the protocol."""

    def failed(self, connection: ClosingConnection, error: Exception) -> None:
        """A bug of ours: the connection is aborted, the worker goes on."""
