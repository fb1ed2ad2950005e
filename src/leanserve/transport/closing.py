"""How a connection ends: who closes, when, and how (docs/explain/closing.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from leanserve.errors import RemoteProtocolError
from leanserve.protocol import responses
from leanserve.protocol.http1 import Http1Codec
from leanserve.transport.deadlines import NEVER
from leanserve.transport.flow import ReaderWatch, WriteGate
from leanserve.transport.peer import Peer
from leanserve.transport.phase import Phase, PhaseMachine, PhaseMove, Wait
from leanserve.transport.roles import Exchange, Service, Tunnel
from leanserve.transport.sockets import close_with_reset, end_now, has_input

if TYPE_CHECKING:
    from leanserve.protocol.proxy_header import Endpoints

__all__ = ["PROBE_S", "ClosingConnection"]


# A look-up in an enum class costs as much as a call; these stand in the path of every connection.
_OPENING, _LINGERING = Phase.OPENING, Phase.LINGERING
_PHASE, _FINISH = PhaseMachine.TABLE, PhaseMove.FINISH
_FIRST_BYTE, _BODY = Wait.FIRST_BYTE, Wait.BODY
#: From the end of the input to the question whether anybody reads: most answers are out by then.
PROBE_S = 0.03
# For input that came while the loop was busy.
_GRACE_S = 0.1


class ClosingConnection(asyncio.Protocol):
    """What a connection knows, and the half of it that ends it; the other half reads and answers."""

    __slots__ = (
        "__weakref__", "codec", "deadline", "endpoints", "exchange", "gate", "held", "held_at_s",
        "held_since_s", "paused", "peer", "phase", "queue_item", "reader_watch", "service", "transport",
        "tunnel", "unsent_bytes", "waits_for", "yielded",
    )  # fmt: skip

    transport: asyncio.Transport
    peer: Peer

    def __init__(self, service: Service, endpoints: Endpoints | None = None) -> None:
        self.service = service
        self.codec = Http1Codec(service.settings.http, service.recogniser)
        self.endpoints = endpoints
        self.phase = _OPENING
        self.gate = WriteGate(service.loop.call_soon)
        self.held = b""  # answers that wait for the next one: the first and the last of them since
        self.held_since_s = self.held_at_s = 0.0
        self.exchange: Exchange | None = None
        self.tunnel: Tunnel | None = None
        self.deadline = NEVER
        self.queue_item: list[Any] | None = None
        self.waits_for = _FIRST_BYTE
        self.paused = False
        self.reader_watch: ReaderWatch | None = None  # made when the peer lets bytes wait
        self.yielded = False  # a turn of reading is to come: nothing more is read from the kernel before
        self.unsent_bytes = 0  # at the last look while lingering

    # What is told

    def hung_up(self) -> None:
        """The peer has reset the connection while nothing was read from it; called by HangupWatch."""
        # While lingering it may be that both sides are closed, without a reset; and there we read.
        if self.phase < _LINGERING:
            self.abort()

    def half_closed(self) -> None:
        """The peer has closed its side behind what we do not read; called by HangupWatch."""
        if self.paused and Phase.ACTIVE <= self.phase <= Phase.LAST:
            if self.peer.tls is not None or self.service.settings.cancel.half_close != "deliver":
                self.abort()  # as eof_received
            elif self.codec.response is None:
                self._wait(Wait.PROBE, PROBE_S)

    def deadline_reached(self) -> None:
        """Called by Deadlines."""
        self._guard(self._deadline_reached)

    # Faults

    def _guard(self, call: Callable[..., None], *args: Any) -> None:
        """Run one callback: a fault of ours costs this connection and no other."""
        try:
            call(*args)
        except Exception as error:  # noqa: BLE001 - as in Connection.data_received
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if isinstance(error, RemoteProtocolError):
            self.refuse(error)
        else:
            self.service.failed(self, error)
            self.reset()

    def refuse(self, error: RemoteProtocolError) -> None:
        """Answer what broke the protocol, as far as an answer is still possible, and close."""
        self.service.refused(self, error)
        tunnel, exchange = self.tunnel, self.exchange
        self.tunnel = self.exchange = None
        if tunnel is not None or self.phase >= Phase.TUNNEL:
            if tunnel is not None:
                tunnel.connection_lost(error)
            self.abort()
            return
        self.write_held()
        if self.codec.response is None:
            headers = [*self.service.default_headers, *error.headers]
            self.transport.write(responses.encode_refusal(error.status, headers))
        if exchange is not None:
            exchange.connection_lost(error)
        self.finish()

    # The end

    def finish(self, *, linger: bool = True) -> None:
        """Send what is written, close our side, and read on until the peer has closed its own.

        RFC 9112 section 9.6: closing at once while bytes of the peer are unread makes the kernel send a
        reset, which may destroy our last response before the peer has read it.
        """
        if self._advance(_FINISH) is not _LINGERING:
            return
        self.write_held()
        self.unsent_bytes = unsent = self.transport.get_write_buffer_size()
        if not (linger or unsent or self.peer.tls):
            self.transport.close()  # and connection_lost is on its way: there is nothing to wait for
            return
        timeouts, drain = self.service.settings.timeouts, self.service.settings.drain
        self._wait(
            Wait.LINGER, drain.drain_idle_timeout if self.service.draining else timeouts.linger_timeout
        )
        if not linger or self.codec.eof or not self.transport.can_write_eof():
            self.transport.close()
            return
        try:
            self.transport.write_eof()
        except OSError:
            self.transport.abort()  # the peer has reset the connection; connection_lost is on its way
        else:
            if self.paused:
                self._resume()

    def _resume(self) -> None:
        """Have the transport read again, unless a turn of reading is to come first."""
        self.paused = False
        if not self.yielded and not self.transport.is_closing():
            self.transport.resume_reading()

    def watch_reader(self, *, on: bool) -> None:
        """Begin or end to measure how fast the peer reads what waits for it."""
        watch, timeout_s = self.reader_watch, self.service.settings.request.send_timeout
        if on and timeout_s is not None and not self.gate.lost:
            if watch is None:
                watch = self.reader_watch = ReaderWatch(self, timeout_s)
            watch.begin()
        elif watch is not None:
            watch.deadline = NEVER

    def cut(self, error: RemoteProtocolError) -> None:
        """End it without an answer, so that the peer sees an error and not an end."""
        self.service.refused(self, error)
        handler, self.exchange, self.tunnel = self.tunnel or self.exchange, None, None
        if handler is not None:
            handler.connection_lost(error)
        self.reset()

    def _client_is_done(self) -> bool:
        """Whether nothing can come that an immediate close would answer with a reset.

        RFC 9112 section 9.6: a client that sent "close" "MUST NOT send further requests on that connection".
        Behind a body there may be a stray CRLF of an old client (section 2.2).
        """
        request = self.codec.request
        return request is not None and not (request.keep_alive or request.body or self.codec.buffer)

    def write_held(self) -> None:
        """Write the answers that wait for the next one."""
        if self.held:
            data, self.held = self.held, b""
            if not self.transport.is_closing():
                self.transport.write(data)

    def abort(self) -> None:
        """Close at once; what is unsent is dropped."""
        self.transport.abort()

    def reset(self) -> None:
        """Close so that the peer sees an error and not an end: RST instead of FIN."""
        close_with_reset(self.transport)
        self.abort()

    def drain(self) -> None:
        """The server has begun to stop."""
        handler = self.tunnel or self.exchange
        if self.phase is Phase.LINGERING:
            if not self.transport.get_write_buffer_size():
                self._wait(Wait.LINGER, self.service.settings.drain.drain_idle_timeout)
        elif handler is not None:
            handler.drain()
        elif self.phase in (Phase.OPENING, Phase.IDLE) and self.waits_for is not Wait.HEAD:
            # The next request may be on its way: it is answered if it comes now. Closing would lose it.
            self._wait(Wait.FIRST_BYTE, self.service.settings.drain.drain_idle_timeout)

    def cancel(self, reason: str) -> None:
        """The server does not wait any longer."""
        handler = self.tunnel or self.exchange
        if handler is not None:
            handler.cancel(reason)
        else:
            self.abort()

    def _advance(self, move: PhaseMove) -> Phase:
        phase: Phase
        self.phase = phase = _PHASE[self.phase, move]
        return phase

    def _wait(self, wait: Wait, seconds: float) -> None:
        self.waits_for = wait
        self.service.deadlines.set(self, seconds)

    def _deadline_reached(self) -> None:
        wait = self.waits_for
        if wait is Wait.TUNNEL:
            if self.tunnel is not None:
                self.tunnel.deadline_reached()
        elif wait is Wait.LINGER:
            self._end_linger()
        elif wait is Wait.PROBE:
            self._probe()
        elif wait in (Wait.HEAD, _BODY) and not self.paused:
            if has_input(self.transport):  # it is we who are late
                self._wait(wait, _GRACE_S)
                return
            what = "head" if wait is Wait.HEAD else "body"
            raise RemoteProtocolError(f"the request {what} took too long", status=408, cause="deadline")
        elif wait is Wait.NEXT_REQUEST and has_input(self.transport):
            # A request arrived while the timer was about to fire: serve it instead of closing on it.
            self._wait(Wait.FIRST_BYTE, self.service.settings.timeouts.first_byte_timeout)
        elif wait is _FIRST_BYTE and has_input(self.transport):
            idle_s = self.service.settings.drain.drain_idle_timeout
            self._wait(_FIRST_BYTE, idle_s if self.service.draining else _GRACE_S)
        else:
            # Nothing of ours is under way to the peer, but for a response sent ahead of the request's end. A
            # request may be, and where the peer hears now that it will not be answered, few are.
            ended = wait is not Wait.REST_OF_BODY and end_now(self.transport)
            self.finish(linger=ended or wait is Wait.REST_OF_BODY)

    def _probe(self) -> None:
        """Ask whether a peer that has closed its side still reads: TCP answers bytes to one that has closed
        both with a reset."""
        request, head = self.codec.request, self.codec.response
        if request is None or self.transport.is_closing() or (head is not None and not self.codec.eof):
            return
        if data := responses.encode_probe(request, head):
            self.write_held()
            self.transport.write(data)

    def _end_linger(self) -> None:
        """A peer that still takes bytes of a long answer is given another turn; one that does not is cut."""
        unsent = self.transport.get_write_buffer_size()
        if unsent < self.unsent_bytes:
            self.unsent_bytes = unsent
            self._wait(Wait.LINGER, self.service.settings.timeouts.linger_timeout)
        elif unsent:
            self.reset()  # without them the answer must not look complete
        else:
            self.abort()
