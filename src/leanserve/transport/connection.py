"""One accepted connection: when bytes move, and who closes when.

The connection knows bytes, events and deadlines; what a request means is the exchange's business. There is no
queue and no task between the two: events go in as calls, and so do answers.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from leanserve.errors import IllegalTransition
from leanserve.protocol import responses
from leanserve.protocol.events import Data, EndOfBody, Request
from leanserve.protocol.http1 import FileRange
from leanserve.protocol.responses import CHUNK_SIZE, JOINED_BYTES, Framing
from leanserve.transport.closing import PROBE_S, ClosingConnection
from leanserve.transport.deadlines import NEVER
from leanserve.transport.flow import WRITE_SHIFT, WriteGate
from leanserve.transport.peer import describe_peer
from leanserve.transport.phase import Phase, PhaseMachine, PhaseMove, Wait
from leanserve.transport.roles import Tunnel
from leanserve.transport.sendfile import send_range

if TYPE_CHECKING:
    from leanserve.protocol.fastpath import PlainHead

__all__ = ["Connection"]


# A look-up in an enum class costs as much as a call; these stand in the path of every request.
_OPENING, _IDLE, _ACTIVE, _LAST, _LINGERING = (
    Phase.OPENING, Phase.IDLE, Phase.ACTIVE, Phase.LAST, Phase.LINGERING,
)  # fmt: skip
_PHASE, _FINISH, _LOST = PhaseMachine.TABLE, PhaseMove.FINISH, PhaseMove.LOST
_REQUEST, _LAST_REQUEST = PhaseMachine.on(PhaseMove.REQUEST), PhaseMachine.on(PhaseMove.LAST_REQUEST)
_DONE = PhaseMachine.on(PhaseMove.DONE)
_FIRST_BYTE, _HEAD, _BODY, _NEXT_REQUEST = Wait.FIRST_BYTE, Wait.HEAD, Wait.BODY, Wait.NEXT_REQUEST
# Of a body, in one turn of reading. Each read is one, but for a chunked body: there each chunk is.
_PIECES_PER_TURN = 64
_CHUNKED, _LENGTH = Framing.CHUNKED, Framing.LENGTH
# Answers to pipelined requests go out together, up to so much, as long as each is there when the application
# has been called and has not had to wait. Those to GET alone: no answer to a request that may have changed
# something is kept back. Where the application computes for longer than this, none is for a while.
_HELD_BYTES = 4096
_HELD_S = 0.005
_NONE_HELD_S = 0.25
# asyncio's own writelines never told its protocol to pause, whatever the peer left unread, from Python 3.12.0
# until 3.12.9 and 3.13.2 (CVE-2024-12254).
_WRITELINES_PAUSES = not (3, 12) <= sys.version_info < (3, 12, 9) and not (
    (3, 13) <= sys.version_info < (3, 13, 2)
)


class Connection(ClosingConnection):
    """The asyncio protocol of one accepted stream; how it ends is in the class above it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<Connection {self.phase.name} {getattr(self, 'peer', None)}>"

    # What the event loop calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accepted, and the TLS handshake is over."""
        self.transport = transport
        service = self.service
        self.peer = describe_peer(transport, service.server_cert, self.endpoints)
        settings = service.settings
        high = settings.flow.send_high_water
        # Both marks: uvloop's own low-water mark is 16 bytes, which makes a writer wait until all is sent.
        transport.set_write_buffer_limits(high=high, low=high // 4)
        self._wait(_FIRST_BYTE, settings.timeouts.first_byte_timeout)
        service.connection_opened(self)

    def data_received(self, data: bytes) -> None:
        """Bytes from the peer."""
        try:
            if self.tunnel is not None:
                self.tunnel.data_received(data)
            elif self.phase <= _LAST:
                self.codec.receive(data)
                self._read()
        except Exception as error:  # noqa: BLE001 - one of the three named places: the connection callback
            self._fail(error)

    def eof_received(self) -> bool:
        """The peer has closed its side. True keeps ours open."""
        self.codec.eof = True
        self.write_held()
        if self.codec.buffer:
            self._read_on()  # a pipelined request whose turn was to come next
        phase = self.phase
        if phase is Phase.TUNNEL:
            assert self.tunnel is not None
            self._guard(self.tunnel.eof_received)
        elif phase <= _IDLE and self.codec.buffer and self.gate.full:
            return self._serves_half_closed()  # requests whose turn comes when it has read
        elif phase in (Phase.ACTIVE, Phase.LAST) and self.codec.request_ended:
            still_wanted = self._serves_half_closed()
            if still_wanted:
                self._watch_for_reset()
                self._wait(Wait.PROBE, PROBE_S)
            return still_wanted
        return False

    def _serves_half_closed(self) -> bool:
        """RFC 9112 section 9.6 knows clients that close their side early: the answer is still wanted. TLS as
        asyncio speaks it has no half-close."""
        return self.peer.tls is None and self.service.settings.cancel.half_close == "deliver"

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone; called once."""
        self._advance(_LOST)
        service = self.service
        service.deadlines.forget(self)
        if self.reader_watch is not None:
            service.deadlines.forget(self.reader_watch)
            self.reader_watch = None  # it knows us
        if service.hangups is not None:
            service.hangups.forget(self)
        self.gate.lose()
        handler, self.exchange, self.tunnel = self.tunnel or self.exchange, None, None
        if handler is not None:
            handler.connection_lost(exc)
        transport: Any = self.transport
        if hasattr(transport, "_read_ready_cb"):
            # asyncio's keeps bound methods of its own (the second from Python 3.12 on): a cycle, a kilobyte
            # per connection, that only the collector would find.
            transport._read_ready_cb = transport._write_ready = None
        service.connection_closed(self)

    def pause_writing(self) -> None:
        """The transport is above its high-water mark."""
        self.gate.pause()
        self.watch_reader(on=True)

    def resume_writing(self) -> None:
        """The transport is below its low-water mark."""
        self.gate.resume()
        self.watch_reader(on=False)
        if self.phase <= _IDLE and self.codec.buffer:
            self.resume_reading()
            self._read_on()

    # Reading

    def _read(self) -> None:
        codec, service = self.codec, self.service
        if codec.request is None and self._has_unread_answers():
            return
        came = pieces = 0
        while (event := codec.next_event()) is not None:
            if type(event) is Request:
                if event.keep_alive and not service.draining:
                    self.phase = _REQUEST[self.phase]
                else:
                    self.phase = _LAST_REQUEST[self.phase]
                self.deadline = NEVER
                self.exchange = service.open_exchange(self, event)
                if not event.body:
                    break  # what is behind it is the next request
            elif self.exchange is None:
                raise IllegalTransition(f"{event!r} without an exchange")
            elif type(event) is Data:
                came += len(event.data)
                self.exchange.body_received(event.data)
                pieces += 1
                if pieces >= _PIECES_PER_TURN and codec.buffer:
                    self._end_turn()
                    self._await_body(came)
                    return
            else:
                assert type(event) is EndOfBody
                self.exchange.body_ended()
                self._request_ended()
                break
        else:
            self._await_body(came)
        if codec.buffer:
            self._leave_rest()

    def _leave_rest(self) -> None:
        """What has come cannot be read yet, or not alone."""
        settings = self.service.settings
        if self.phase <= _IDLE:
            if self.waits_for is not _HEAD:
                self._wait(_HEAD, settings.timeouts.header_timeout)
        elif len(self.codec.buffer) > settings.flow.receive_high_water:
            self.pause_reading()  # pipelined requests wait in the kernel, not here

    def _has_unread_answers(self) -> bool:
        """Whether the peer has left so many that its next request waits: resume_writing() reads on."""
        if not self.gate.full:
            return False
        self.deadline = NEVER  # the reader's watch has one
        if len(self.codec.buffer) > self.service.settings.flow.receive_high_water:
            self.pause_reading()
        return True

    def _await_body(self, came: int) -> None:
        """More of a request body has to come; each byte buys time, but never more than ``body_timeout``.

        Args:
            came: how many bytes of it have just come.
        """
        if not _ACTIVE <= self.phase <= _LAST or self.codec.request_ended:
            return
        if self.waits_for is not _BODY and self.deadline != NEVER:
            return  # it is answered already: the rest of it has a time of its own
        request, settings = self.codec.request, self.service.settings.request
        assert request is not None
        if self.paused or (request.expects_continue and not came and self.waits_for is not _BODY):
            return  # it is we who keep the client waiting
        time_s = settings.body_timeout
        if settings.body_min_rate and self.deadline != NEVER:
            left_s = self.deadline - self.service.deadlines.now()
            time_s = min(time_s, left_s + came / settings.body_min_rate)
        self._wait(_BODY, time_s)

    def _end_turn(self) -> None:
        """So many small chunks are here that other connections have their turn first."""
        if not self.yielded:
            self.yielded = True
            if not self.paused:
                self.transport.pause_reading()
            self.service.loop.call_soon(self._begin_turn)

    def _begin_turn(self) -> None:
        self.yielded = False
        if self.phase <= _LAST:
            self._guard(self._read)
        if not self.yielded and not self.paused and not self.transport.is_closing():
            self.transport.resume_reading()

    def _request_ended(self) -> None:
        """No more has to come; if its response has ended already, it is time for the next request."""
        if self.waits_for is _BODY:
            self.deadline = NEVER
        elif self.waits_for is Wait.REST_OF_BODY and self.deadline != NEVER:
            self.next_exchange()

    def _read_on(self) -> None:
        """Take up a pipelined request. Its application runs in a later turn of the loop: no peer holds the
        worker by sending many."""
        if self.phase <= _IDLE:
            self._guard(self._read)
            if self.codec.eof and self.gate.full and self.phase <= _IDLE:
                return  # its next request waits until it has read
            if self.codec.eof and self.phase is Phase.IDLE:
                self.finish(linger=False)
            elif self.codec.eof and self.phase <= _LAST:
                if not self.codec.request_ended:
                    self.write_held()
                    self.transport.close()  # its end will never come; as eof_received has it closed
                else:
                    self._wait(Wait.PROBE, PROBE_S)

    def pause_reading(self) -> None:
        """Leave further bytes in the kernel."""
        if self.phase < Phase.LINGERING and not self.paused:
            self.paused = True
            if not self.yielded:
                self.transport.pause_reading()
            self._watch_for_reset(end=True)
            if self.waits_for is _BODY:
                self.deadline = NEVER

    def resume_reading(self) -> None:
        """Read again."""
        if self.paused:
            self._resume()
            self._await_body(0)

    def _watch_for_reset(self, *, end: bool = False) -> None:
        """The loop will not notice one: it does not read."""
        if self.service.hangups is not None:
            self.service.hangups.watch(self, end=end)

    # Answering

    def send_plain(self, status: int, plain: PlainHead, body: bytes) -> bool:
        """A whole response in one write; False (and nothing done) when it has to go the planned way."""
        codec, service = self.codec, self.service
        request, encoder = codec.request, service.encoder
        if request is None or encoder is None or not codec.request_ended:
            return False
        close = self.phase is _LAST or service.draining
        data = encoder.encode(request, status, plain, body, service.default_headers, close)
        if data is None:
            return False
        if close and self.phase is not _LAST:
            self._advance(PhaseMove.NO_MORE)
        first = not self.held
        if not first:
            data, self.held = self.held + data, b""
        if codec.buffer and request.method == b"GET" and len(data) < _HELD_BYTES and self._may_hold(first):
            self.held = data  # the next request is here: its answer may be ready in a moment
        else:
            self.transport.write(data)
        return True

    def _may_hold(self, first: bool) -> bool:
        now, service = monotonic(), self.service
        if first:
            self.held_since_s = now
        elif now - self.held_at_s > _HELD_S:  # one turn of the loop took that long
            service.holds_from_s = now + _NONE_HELD_S
        self.held_at_s = now
        return now >= service.holds_from_s and now - self.held_since_s <= _HELD_S

    def _end_hold(self, held: bytes) -> None:
        """The application of the next request has been called, and has not answered at once."""
        if self.held is held:
            self.write_held()
            now = monotonic()
            if now - self.held_at_s > _HELD_S:
                self.service.holds_from_s = now + _NONE_HELD_S

    def send_response(
        self,
        status: int,
        headers: Iterable[tuple[bytes, bytes]],
        body: bytes,
        *,
        more: bool,
        trailers: bool = False,
        plain: PlainHead | None = None,
    ) -> None:
        """Head and first piece of the body; `plain` is the same as `headers`, when they are and more follows.
        Raises AppProtocolError as the codec does."""
        codec, encoder, ours = self.codec, self.service.encoder, self.service.default_headers
        close = self.phase is _LAST or self.service.draining or self._body_is_unwanted()
        start = None
        if plain is not None and encoder is not None and codec.request is not None:
            start = encoder.encode_start(codec.request, status, plain, ours, close)
        if start is not None:
            head, codec.response = start
            pieces = [head, *codec.encode_pieces(body, more=more)]
        else:
            pieces = codec.encode_response_pieces(
                status, headers, ours, body, more=more, close=close, trailers=trailers
            )
        assert codec.response is not None
        if codec.response.close:
            self._advance(PhaseMove.NO_MORE)
        self.write_held()
        self.write_pieces(pieces, len(body), more=more)

    def send_piece(self, data: bytes) -> WriteGate | None:
        """A further piece of a body, not the last: what to wait for before the next one; None (and nothing
        done) when it needs :meth:`send_body`."""
        head, gate, size = self.codec.response, self.gate, len(data)
        assert head is not None
        if head.framing is _CHUNKED:
            if not 0 < size < JOINED_BYTES:
                return None
            data = CHUNK_SIZE[size] + data + b"\r\n"
            gate.credit = credit = gate.credit - 1
        elif head.framing is _LENGTH and size <= head.left:
            head.left -= size
            gate.credit = credit = gate.credit - 1 - (size >> WRITE_SHIFT)  # as spend(), without a call
        else:
            return None
        if credit < 0:
            gate.rest()
        transport = self.transport
        if not transport.is_closing():
            transport.write(data)
        return gate

    def send_body(self, data: bytes, *, more: bool) -> None:
        """A further piece of the body; an end without data when `more` is False and `data` is empty."""
        if pieces := self.codec.encode_pieces(data, more=more):
            self.write_pieces(pieces, len(data), more=more)
        elif more:
            self.gate.spend(len(data))  # what is dropped (HEAD) has its turns, too

    def write_pieces(self, pieces: Sequence[bytes], size: int, *, more: bool = True) -> None:
        """`size` bytes of a body or a message with their framing: joined, unless that would copy much."""
        if more:
            self.gate.spend(size)  # who has no more to say does not wait for a turn
        if self.transport.is_closing():  # asyncio logs a warning for each write to a broken connection
            return
        if len(pieces) == 1:
            self.transport.write(pieces[0])
        elif size < JOINED_BYTES or not _WRITELINES_PAUSES:
            self.transport.write(b"".join(pieces))
        else:
            self.transport.writelines(pieces)

    def send_trailers(self, trailers: Iterable[tuple[bytes, bytes]]) -> None:
        """The end of the response, with trailers."""
        self.transport.write(self.codec.encode_trailers(trailers))

    def send_interim(self, status: int, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """An interim response: 100, 103; 101 only through :meth:`enter_tunnel`'s caller."""
        self.write_held()
        self.transport.write(responses.encode_interim(status, headers))
        if status == 100 and not self.codec.request_ended and not self.paused:
            self._wait(_BODY, self.service.settings.request.body_timeout)

    async def send_file(self, fd: int, count: int) -> None:
        """The rest of the body from the start of a file: sendfile on plain sockets, reads and writes on TLS.

        Raises:
            ClientDisconnected: the client has gone.
        """
        for piece in self.codec.encode_file(count):
            if isinstance(piece, FileRange):
                await send_range(self, fd, piece.count)
            else:
                self.transport.write(piece)

    def _body_is_unwanted(self) -> bool:
        """Whether so much of the request is still to come that closing costs less than reading it."""
        request = self.codec.request
        assert request is not None
        if self.codec.request_ended:
            return False
        return (
            request.content_length is None or request.content_length > _REST_BYTES or request.expects_continue
        )

    def exchange_done(self) -> None:
        """The response is complete; called by the exchange, once."""
        if self.phase > _LAST:
            return
        if self.codec.request_ended or self.phase is Phase.LAST:
            self.next_exchange()
        else:
            # The application answered without reading all: the rest has to pass before the next request.
            self._wait(Wait.REST_OF_BODY, self.service.settings.timeouts.linger_timeout)
            self.resume_reading()

    def next_exchange(self) -> None:
        """Request and response are complete: make ready for the next, or close."""
        self.exchange = None
        if self.phase is _LAST:
            self.finish(linger=not self._client_is_done())
            return
        self.phase = _DONE[self.phase]
        codec, service = self.codec, self.service
        codec.next_exchange()
        if self.paused:
            self.resume_reading()
        if service.draining:
            # The answer was under way when the drain began, so it could not say "close": as in drain().
            self._wait(Wait.FIRST_BYTE, service.settings.drain.drain_idle_timeout)
        else:
            self.waits_for = _NEXT_REQUEST
            service.deadlines.set(self, service.settings.timeouts.keep_alive_timeout)
        if codec.buffer or codec.eof:
            if service.limits_running:
                service.loop.call_soon(self._read_on)  # in which turn the call that has just answered is over
            else:
                self._read_on()
            if held := self.held:
                service.loop.call_soon(self._end_hold, held)  # behind that application's first step

    # Tunnel

    def enter_tunnel(self, tunnel: Tunnel) -> bytes:
        """Give all further bytes to `tunnel`; those that came behind the head are the result."""
        self._advance(PhaseMove.UPGRADE)
        self.exchange = None
        self.tunnel = tunnel
        return self.codec.take_rest()

    def write(self, data: bytes) -> None:
        """Raw bytes of the tunnel's protocol."""
        self.gate.spend(len(data))
        if not self.transport.is_closing():
            self.transport.write(data)

    def set_deadline(self, seconds: float | None) -> None:
        """Have ``tunnel.deadline_reached()`` called after `seconds`; None takes the deadline away."""
        if seconds is None:
            self.deadline = NEVER
        elif self.phase is Phase.TUNNEL:
            self._wait(Wait.TUNNEL, seconds)


# A rest of a request body up to this size is read and dropped to keep the connection.
_REST_BYTES = 65536
