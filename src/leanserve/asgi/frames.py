"""Reading one open WebSocket: bytes become events in turns of bounded length; pings are answered."""

from __future__ import annotations

import asyncio
import time
from math import inf
from typing import Final, Protocol

from leanserve.asgi.heartbeat import Beat, Heartbeat
from leanserve.errors import RemoteProtocolError
from leanserve.protocol.websocket import Close, Ping, WebSocketCodec
from leanserve.transport.connection import Connection

__all__ = ["FrameReader", "Listener"]

# A turn of reading; then other connections have theirs.
_TURN_S: Final = 0.002
# Pings of one turn that get a pong each. Of more only the latest is answered: RFC 6455 section 5.5.3 lets us.
_PONGS_PER_TURN: Final = 16
# How long the application may take over what came before a fault of the peer.
_FAULT_GRACE_S: Final = 1.0
# When to try again to write a pong to a peer that does not read.
_PONG_RETRY_S: Final = 0.5


class Listener(Protocol):
    """Who is told."""

    def wants_more(self) -> bool:
        """Asked before each turn. What has arrived waits, here and in the kernel, until ``go_on()``."""

    def is_idle(self) -> bool:
        """Whether all messages so far have been dealt with."""

    def message_received(self, message: str | bytes) -> bool:
        """A whole message; the result is as that of ``wants_more()``."""

    def close_received(self, event: Close) -> None:
        """The peer's Close; nothing follows."""

    def violated(self, error: RemoteProtocolError) -> None:
        """The peer broke the protocol; nothing follows. Told when the listener is idle, or after a second."""

    def exhausted(self) -> None:
        """All bytes so far have been dealt with. Not called while the listener does not want them."""


class FrameReader:
    """One per open WebSocket.

    Args:
        connection: where pongs and pings are written and reading is paused.
        codec: of this connection.
        heartbeat: of this connection.
        listener: the exchange.
    """

    __slots__ = (
        "_codec", "_connection", "_fault", "_heartbeat", "_listener", "_pong", "_turn",
        "paused",
    )  # fmt: skip

    def __init__(
        self, connection: Connection, codec: WebSocketCodec, heartbeat: Heartbeat, listener: Listener
    ) -> None:
        self._connection = connection
        self._codec = codec
        self._heartbeat = heartbeat
        self._listener = listener
        #: Whether bytes may be waiting to be dealt with.
        self.paused = False
        self._fault: RemoteProtocolError | None = None
        self._pong: bytes | None = None
        self._turn: asyncio.Handle | None = None

    def release(self) -> None:
        """Let go of the listener, which holds this reader: the two would wait for the cycle collector."""
        if self._turn is not None:
            self._turn.cancel()
        if hasattr(self, "_listener"):
            del self._listener

    def start(self, now: float) -> None:
        """The WebSocket opened at loop time `now`."""
        self._heartbeat.start(now)
        self.beat(now)

    def data_received(self, data: bytes) -> None:
        """Bytes of the peer."""
        self._heartbeat.silent = False
        codec, listener = self._codec, self._listener
        if self.paused or not listener.wants_more():
            codec.receive(data)
        else:
            message = codec.receive_message(data)
            if message is not None and listener.message_received(message) and codec.drained:
                listener.exhausted()
                return
        if self._turn is None:
            self._read()

    def go_on(self) -> None:
        """The listener wants more (or always did: then nothing happens). In a later turn of the loop: else an
        application that only receives would take all that is here without ever waiting."""
        if self.paused and self._turn is None:
            self._turn = self._connection.service.loop.call_soon(self._read)

    def settle(self) -> None:
        """What came before a fault has been dealt with: tell of it now."""
        if self._fault is not None:
            fault, self._fault = self._fault, None
            self._listener.violated(fault)

    # Turns

    def _read(self) -> None:
        """Deal with events until there are none, the listener holds or the turn is over."""
        self._turn = None
        codec, listener = self._codec, self._listener
        pings: list[bytes] = []
        more = listener.wants_more()
        end = time.monotonic() + _TURN_S
        try:
            while more:
                event = codec.next_event()
                if event is None:
                    listener.exhausted()
                    break
                if type(event) is bytes or type(event) is str:
                    more = listener.message_received(event)
                elif type(event) is Ping:
                    del pings[_PONGS_PER_TURN - 1 :]
                    pings.append(event.payload)
                elif type(event) is Close:
                    # RFC 6455 section 5.5.2: a Ping is answered "unless it already received a Close frame".
                    self._answer(pings)
                    pings.clear()
                    listener.close_received(event)
                if not codec.drained and time.monotonic() >= end:
                    self._turn = self._connection.service.loop.call_soon(self._read)
                    break
        except RemoteProtocolError as error:
            # What came before the fault is good and may still be answered: not behind our Close.
            self._fault = error
            if listener.is_idle():
                self.settle()
            else:
                self._connection.set_deadline(_FAULT_GRACE_S)
        if pings:
            self._answer(pings)
        paused = self._turn is not None or not more
        if paused != self.paused:
            self.paused = paused
            if paused:
                self._connection.pause_reading()
            else:
                self._connection.resume_reading()

    # Pongs and pings

    def _answer(self, pings: list[bytes]) -> None:
        pongs = b"".join(map(self._codec.pong, pings))
        if not pongs or self._connection.gate.lost:
            return
        if not self._connection.gate.full:
            self._connection.write(pongs)
        else:
            # A peer that pings and does not read must not fill our memory with pongs.
            self._pong = pings[-1]
            self._connection.set_deadline(_PONG_RETRY_S)

    def beat(self, now: float) -> bool:
        """Send what is due at loop time `now` and set the next deadline. False when the peer is dead."""
        if self._fault is not None:
            self.settle()
            return True
        if self._pong is not None and not self._connection.gate.full:
            self._connection.write(self._codec.pong(self._pong))
            self._pong = None
        due = self._heartbeat.look(now, reading=not self.paused)
        if due is Beat.DEAD:
            return False
        if due is Beat.PING:
            self._connection.write(self._codec.ping())
        next_look = self._heartbeat.next_look
        if self._pong is not None:
            next_look = min(next_look, now + _PONG_RETRY_S)
        self._connection.set_deadline(None if next_look == inf else max(next_look - now, 0.0))
        return True
