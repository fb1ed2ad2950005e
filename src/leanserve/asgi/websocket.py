"""One WebSocket: ASGI messages on one side, the connection on the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar, Final

from leanserve.asgi.cancellation import CANCELLATION, Grace, cancel_task, cause_of
from leanserve.asgi.frames import FrameReader
from leanserve.asgi.heartbeat import Heartbeat
from leanserve.asgi.inbox import Inbox
from leanserve.asgi.messages import (
    App,
    AppService,
    ExchangeRecord,
    Message,
    is_disconnect,
    request_scope,
    run_app,
)
from leanserve.errors import AppProtocolError, ClientDisconnected, RemoteProtocolError
from leanserve.machine import Machine
from leanserve.protocol.deflate import negotiate_deflate
from leanserve.protocol.events import Headers, Request
from leanserve.protocol.responses import REASONS, check_headers
from leanserve.protocol.upgrade import Handshake, build_accept, parse_handshake
from leanserve.protocol.websocket import Close, CloseCode, WebSocketCodec
from leanserve.settings import WebSocketSettings
from leanserve.transport.connection import Connection
from leanserve.transport.phase import Phase

if TYPE_CHECKING:
    from leanserve.flight import Berth

__all__ = ["WebSocketExchange", "WebSocketMachine", "WebSocketMove", "WebSocketState"]

logger = logging.getLogger("leanserve")

# How long an application may take over the websocket.disconnect of a shutdown before it is cancelled.
_SHUTDOWN_GRACE_S: Final = 0.5


class WebSocketState(IntEnum):
    """Where a WebSocket is in its life."""

    HANDSHAKE = 0  # asked for, not answered
    DENYING = 1  # the application answers with an HTTP response
    OPEN = 2
    CLOSING = 3  # our Close is sent, the peer's is awaited
    CLOSED = 4


_CLOSED = WebSocketState.CLOSED


class WebSocketMove(IntEnum):
    """What can happen to a WebSocket."""

    ACCEPT = 0
    DENY = 1
    CLOSE = 2
    END = 3
    LOSE = 4


class WebSocketMachine(Machine[WebSocketState, WebSocketMove]):
    """END is the orderly one: a complete denial, both Closes, a violation answered, a timeout."""

    __slots__ = ()
    START: ClassVar[IntEnum] = WebSocketState.HANDSHAKE
    TABLE: ClassVar = {
        (WebSocketState.HANDSHAKE, WebSocketMove.ACCEPT): WebSocketState.OPEN,
        (WebSocketState.HANDSHAKE, WebSocketMove.DENY): WebSocketState.DENYING,
        (WebSocketState.HANDSHAKE, WebSocketMove.END): WebSocketState.CLOSED,
        (WebSocketState.HANDSHAKE, WebSocketMove.LOSE): WebSocketState.CLOSED,
        (WebSocketState.DENYING, WebSocketMove.END): WebSocketState.CLOSED,
        (WebSocketState.DENYING, WebSocketMove.LOSE): WebSocketState.CLOSED,
        (WebSocketState.OPEN, WebSocketMove.CLOSE): WebSocketState.CLOSING,
        (WebSocketState.OPEN, WebSocketMove.END): WebSocketState.CLOSED,
        (WebSocketState.OPEN, WebSocketMove.LOSE): WebSocketState.CLOSED,
        (WebSocketState.CLOSING, WebSocketMove.END): WebSocketState.CLOSED,
        (WebSocketState.CLOSING, WebSocketMove.LOSE): WebSocketState.CLOSED,
        (WebSocketState.CLOSED, WebSocketMove.LOSE): WebSocketState.CLOSED,
    }


class WebSocketExchange:
    """Built when an upgrade request is complete; lives until the application has returned.

    Raises:
        RemoteProtocolError: the request is no handshake that can be granted.
    """

    __slots__ = (
        "berth", "cancellation", "codec", "connection", "denial", "extension", "grace", "handshake", "inbox",
        "life", "reader", "record", "service", "started", "task",
    )  # fmt: skip

    #: Where the flight recorder has noted it.
    berth: Berth | None

    def __init__(self, service: AppService, connection: Connection, request: Request, app: App) -> None:
        self.handshake: Handshake = parse_handshake(request)
        self.service = service
        self.connection = connection
        self.codec, self.extension = _build_codec(self.handshake, service)
        self.reader = FrameReader(connection, self.codec, _build_heartbeat(service.settings.websocket), self)
        self.life = WebSocketMachine()
        self.inbox = Inbox(service.settings.flow.receive_high_water)
        #: The head of a denial, from websocket.http.response.start until its first body message.
        self.denial: tuple[int, Headers] | None = None
        self.started = time.monotonic()
        extensions = {"websocket.http.response": {}, **service.extensions}
        scope = request_scope(service, request, connection.peer, "websocket", extensions)
        scope["subprotocols"] = list(self.handshake.subprotocols)
        self.cancellation = scope["extensions"][CANCELLATION] = service.cancellation.copy()
        if service.policies is not None:
            self.cancellation["policy"] = service.policies.find(request.raw_path)
        self.grace: Grace | None = None
        self.record = ExchangeRecord(
            scope["client"], "GET", request.raw_path.decode("latin-1"), request.query.decode("latin-1"),
            request.version, 0, 0.0, None, 0, 0, "", request.headers,
        )  # fmt: skip
        self.inbox.put({"type": "websocket.connect"})
        # A copy of the context that stood after the lifespan startup, never another request's.
        self.task = service.loop.create_task(run_app(self, app, scope), context=service.context.copy())

    def __repr__(self) -> str:
        return f"<WebSocketExchange {self.life.state.name} {self.record.path}>"

    def __str__(self) -> str:
        return self._name()

    # What the connection tells

    def body_received(self, data: bytes) -> None:
        """Never called: a handshake has no body."""

    def body_ended(self) -> None:
        """The request is complete."""

    def data_received(self, data: bytes) -> None:
        """Bytes of the open WebSocket."""
        self.record.received_bytes += len(data)
        self.reader.data_received(data)

    def eof_received(self) -> None:
        """The peer has closed its side without a Close: connection_lost follows."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        if self.life.state is not WebSocketState.CLOSED:
            self.service.client_left(self)
            self._peer_ended(cause_of(exc))
            self._end(WebSocketMove.LOSE, cause_of(exc))
        if self.reader.paused:
            self.reader.go_on()  # messages that arrived in time are delivered before the disconnect
        else:
            self.inbox.end(_disconnect(CloseCode.ABNORMAL))
        if self.task.done():
            self.reader.release()

    def deadline_reached(self) -> None:
        """A ping or a pong is due, or the peer has not answered our Close in time."""
        if self.life.state is WebSocketState.CLOSING:
            self._finish()
        elif not self.reader.beat(self.service.loop.time()):
            logger.info("no answer to a ping at %s: closing with 1011", self._name())
            self.connection.write(self.codec.close(CloseCode.INTERNAL_ERROR, "no answer to a ping"))
            self.inbox.end(_disconnect(CloseCode.INTERNAL_ERROR, "no answer to a ping"))
            self._peer_ended("client_gone")
            self._finish("client_gone")

    def drain(self) -> None:
        """The server has begun to stop: the WebSocket keeps the whole drain time."""

    def cancel(self, reason: str) -> None:
        """The server does not wait any longer: 1012 (service restart), then a moment for the application."""
        if self.life.state is WebSocketState.OPEN:
            self.record.cause = reason
            self._close(CloseCode.SERVICE_RESTART, "")
        if self.life.state < WebSocketState.OPEN:
            self.cancel_now(reason)
        else:
            self._give_grace(_SHUTDOWN_GRACE_S, reason)

    def cancel_now(self, cause: str) -> bool:
        """Cancel the application, and tell it why; False when it is in a thread, and will hear it later."""
        self.cancellation["cause"] = cause
        return cancel_task(self.service.loop, self.task, cause)

    def _peer_ended(self, cause: str) -> None:
        """The peer has ended it, before the application did: who does not leave then is cancelled."""
        if self.life.state < WebSocketState.CLOSING and self.cancellation.get("policy") == "cancel":
            self._give_grace(self.service.settings.cancel.ws_cancel_grace, cause)

    def _give_grace(self, seconds: float, cause: str) -> None:
        if not self.task.done():
            if self.grace is None:
                self.grace = Grace(self.service.deadlines, self)
            self.grace.give(seconds, cause)

    # What the reader tells

    def wants_more(self) -> bool:
        """Reading stops while the application has too much to receive."""
        return not self.inbox.full

    def is_idle(self) -> bool:
        """The application waits, or cannot receive anything any more."""
        return self.inbox.awaited or self.inbox.last is not None

    def message_received(self, message: str | bytes) -> bool:
        """A message; one behind our own Close is nobody's."""
        inbox = self.inbox
        if inbox.last is None:
            kind = "text" if type(message) is str else "bytes"
            inbox.put({"type": "websocket.receive", kind: message}, len(message))
        return not inbox.full

    def close_received(self, event: Close) -> None:
        """RFC 6455 section 5.5.1: answer with a Close, "typically echoing the status code", then close."""
        self.inbox.end(_disconnect(event.code, event.reason))
        self._peer_ended("client_gone")
        if self.life.state is WebSocketState.OPEN:
            self.connection.write(self.codec.close(event.code))
        if self.life.state is not WebSocketState.CLOSED:
            self._finish()

    def violated(self, error: RemoteProtocolError) -> None:
        """RFC 6455 section 7.1.7: fail the connection: a Close with the code of the fault, then close."""
        self.inbox.end(_disconnect(error.close_code, error.reason))
        self._peer_ended(error.cause)
        self.connection.service.refused(self.connection, error)
        if self.life.state is WebSocketState.OPEN:
            self.connection.write(self.codec.close(error.close_code))
        if self.life.state is not WebSocketState.CLOSED:
            self._finish("bad_request")

    def exhausted(self) -> None:
        """All that arrived has been read; behind a loss that makes it final."""
        if self.life.state is _CLOSED:  # a look-up in an enum class costs as much as a call
            self.inbox.end(_disconnect(CloseCode.ABNORMAL))

    # What the application calls

    async def receive(self) -> Message:
        """ASGI receive: connect, messages, then disconnect for ever."""
        inbox, reader = self.inbox, self.reader
        while (message := inbox.take()) is None:
            reader.settle()
            if inbox.last is None:
                await inbox.waiter(self.task.get_loop())
        if reader.paused:
            reader.go_on()
        return message

    async def send(self, message: Message) -> None:
        """ASGI send.

        Raises:
            AppProtocolError: a message that ASGI or WebSocket does not allow here.
            ClientDisconnected: the WebSocket is closed, by whomever.
        """
        kind, state = message["type"], self.life.state
        handler = _HANDLERS.get((state, kind))
        if handler is not None:
            if handler(self, message) and not self.connection.gate.open:
                await self.connection.gate.wait_open()
        elif kind not in _KINDS:
            raise AppProtocolError(f"a WebSocket application cannot send {kind!r}")
        elif state < WebSocketState.CLOSING:
            raise AppProtocolError(f"{kind} is not possible while the WebSocket is {state.name}")
        elif kind != "websocket.close":  # closing twice is no error: both sides often do
            raise ClientDisconnected("the WebSocket is closed")

    # One for each message. True when more may follow, so that it waits for a peer that does not read.

    def _accept(self, message: Message) -> bool:
        connection = self.connection
        status, headers = build_accept(
            self.handshake, message.get("subprotocol"), message.get("headers") or (), self.extension
        )
        names = {name for name, _ in headers}
        headers += [item for item in connection.service.default_headers if item[0] not in names]
        connection.send_interim(status, headers)
        self.life.advance(WebSocketMove.ACCEPT)
        self.service.websocket_opened()
        self.record.status, self.record.response_headers = status, headers
        self.record.first_byte_s = time.monotonic() - self.started
        rest = connection.enter_tunnel(self)
        connection.resume_reading()
        self.reader.start(self.service.loop.time())
        if rest:
            self.data_received(rest)
        if connection.codec.eof and self.life.state is WebSocketState.OPEN:
            connection.finish()
        return False

    def _refuse(self, message: Message) -> bool:
        # ASGI: "If this is sent before the socket is accepted, the server must close the connection with a
        # HTTP 403 error code (Forbidden), and not complete the WebSocket handshake".
        self._answer(403)
        return False

    def _start_denial(self, message: Message) -> bool:
        status = message.get("status")
        if not isinstance(status, int) or not 200 <= status <= 999:
            raise AppProtocolError(f"status {status!r} is not that of a final response")
        self.denial = (int(status), check_headers(message.get("headers") or ()))
        self.life.advance(WebSocketMove.DENY)
        return False

    def _deny(self, message: Message) -> bool:
        body = message.get("body", b"")
        if not isinstance(body, (bytes, bytearray, memoryview)):
            raise AppProtocolError(f"body must be bytes, not {type(body).__name__}")
        more = bool(message.get("more_body", False))
        if self.denial is not None:
            self._send_denial(*self.denial, bytes(body), more=more)
        else:
            self.connection.send_body(bytes(body), more=more)
        self.record.sent_bytes += len(body)
        head = self.connection.codec.response
        if head is not None and head.fault is not None:
            self._finish("app_error")
            raise AppProtocolError(head.fault)
        if not more:
            self._complete_denial()
        return more

    def _send(self, message: Message) -> bool:
        data, text = message.get("bytes"), message.get("text")
        if data is None and isinstance(text, str):
            pieces = self.codec.send_text(text)
        elif isinstance(data, (bytes, bytearray, memoryview)):
            pieces = self.codec.send_bytes(bytes(data))
        else:
            raise AppProtocolError("websocket.send needs bytes in 'bytes' or a str in 'text'")
        size = len(pieces[0])
        if len(pieces) == 1:
            self.connection.write(pieces[0])
        else:
            payload = len(pieces[1])
            self.connection.write_pieces(pieces, payload)
            size += payload
        self.record.sent_bytes += size
        return True

    def _close_by_app(self, message: Message) -> bool:
        code, reason = message.get("code", CloseCode.NORMAL), message.get("reason") or ""
        if not isinstance(code, int) or not isinstance(reason, str):
            raise AppProtocolError("websocket.close needs an int in 'code' and a str in 'reason'")
        self._close(code, reason)
        return False

    # Answers and ends

    def _answer(self, status: int) -> None:
        """A denial of our own."""
        body = REASONS[status]
        self._send_denial(status, [(b"content-type", b"text/plain; charset=utf-8")], body, more=False)
        self.record.sent_bytes += len(body)
        self._complete_denial()

    def _send_denial(self, status: int, headers: Headers, body: bytes, *, more: bool) -> None:
        # Bytes behind a refused handshake are meant as frames and must never be read as a request.
        self.connection.send_response(status, [*headers, (b"connection", b"close")], body, more=more)
        self.denial = None
        self.record.status, self.record.response_headers = status, headers
        self.record.first_byte_s = time.monotonic() - self.started

    def _complete_denial(self) -> None:
        self.inbox.end(_disconnect(CloseCode.ABNORMAL), at_once=True)
        self._end(WebSocketMove.END)
        self.connection.exchange_done()

    def _close(self, code: int, reason: str) -> None:
        """Say Close first. Whoever closes first has said the code that the application sees."""
        self.connection.write(self.codec.close(code, reason))
        self.inbox.end(_disconnect(code, reason), at_once=True)
        self.life.advance(WebSocketMove.CLOSE)
        self.connection.set_deadline(self.service.settings.websocket.ws_close_timeout)
        self.reader.settle()
        self.reader.go_on()

    def _finish(self, cause: str = "") -> None:
        """The closing handshake is over or beyond hope. RFC 6455 section 7.1.1: the server closes first."""
        self._end(WebSocketMove.END, cause)
        self.connection.finish()

    def _end(self, move: WebSocketMove, cause: str = "") -> None:
        self.life.advance(move)
        record = self.record
        record.cause = record.cause or cause
        if self.service.tally is not None:
            self.service.tally.add_websocket(record.status, record.cause)
        if record.status == 101:
            self.service.websocket_closed()
        record.status = record.status or 499
        record.duration_s = time.monotonic() - self.started
        self.service.exchange_done(record)

    # The application

    def app_returned(self, error: Exception | SystemExit | None) -> None:
        """The application has returned, or raised `error`."""
        if error is None:
            if self.life.state < WebSocketState.OPEN:
                # ASGI: a connect "must" be answered by accept or close: this is a fault and not a refusal.
                logger.error("the application returned without answering the handshake of %s", self._name())
            self._say_rest(500, CloseCode.NORMAL)
            return
        if is_disconnect(error):
            logger.debug("the client left %s while the application was sending", self._name())
        else:
            logger.error("exception in the application at %s", self._name(), exc_info=error)
        self._say_rest(500, CloseCode.INTERNAL_ERROR)

    def app_cancelled(self) -> None:
        """It was cancelled."""
        self._say_rest(503, CloseCode.SERVICE_RESTART)

    def app_ended(self) -> None:
        """Called behind either; nothing more of this exchange will run."""
        if self.grace is not None:
            self.grace.end()
            self.grace = None  # it knows us
        self.service.exchange_ended(self, self.record.received_bytes, self.record.sent_bytes)
        if self.connection.phase is Phase.CLOSED or self.connection.tunnel is not self:
            self.reader.release()  # nobody will tell us that the connection is lost

    def _say_rest(self, status: int, code: CloseCode) -> None:
        """Say what the application has left unsaid."""
        state = self.life.state
        if state is WebSocketState.OPEN:
            if code is CloseCode.INTERNAL_ERROR:
                self.record.cause = "app_error"
            self._close(code, "")
        elif state is WebSocketState.HANDSHAKE or self.denial is not None:
            self.record.cause = self.record.cause or "app_error"
            self._answer(status)
        elif state is WebSocketState.DENYING:
            # A response that has begun must not look complete.
            self._end(WebSocketMove.END, "app_error")
            self.connection.reset()

    def _name(self) -> str:
        return f"{self.record.method} {self.record.path!a}"


def _build_codec(handshake: Handshake, service: AppService) -> tuple[WebSocketCodec, str | None]:
    """The codec, and what is to be said about its compression if the handshake is accepted."""
    settings = service.settings.websocket
    agreed = None
    if settings.ws_per_message_deflate:
        agreed = negotiate_deflate(
            handshake.extensions, settings.ws_max_size, settings.ws_deflate_window_bits,
            settings.ws_deflate_mem_level, context_takeover=settings.ws_deflate_context_takeover,
        )  # fmt: skip
    deflate, extension = agreed or (None, None)
    codec = WebSocketCodec(
        max_size_bytes=settings.ws_max_size, max_fragments=settings.ws_max_fragments, deflate=deflate,
        recogniser=service.frame_recogniser,
    )  # fmt: skip
    return codec, extension


def _build_heartbeat(settings: WebSocketSettings) -> Heartbeat:
    return Heartbeat(settings.ws_ping_interval, settings.ws_ping_timeout)


def _disconnect(code: int, reason: str = "") -> Message:
    return {"type": "websocket.disconnect", "code": int(code), "reason": reason}


_HANDLERS: dict[tuple[WebSocketState, str], Callable[[WebSocketExchange, Message], bool]] = {
    (WebSocketState.HANDSHAKE, "websocket.accept"): WebSocketExchange._accept,
    (WebSocketState.HANDSHAKE, "websocket.close"): WebSocketExchange._refuse,
    (WebSocketState.HANDSHAKE, "websocket.http.response.start"): WebSocketExchange._start_denial,
    (WebSocketState.DENYING, "websocket.http.response.body"): WebSocketExchange._deny,
    (WebSocketState.OPEN, "websocket.send"): WebSocketExchange._send,
    (WebSocketState.OPEN, "websocket.close"): WebSocketExchange._close_by_app,
}
_KINDS = frozenset(kind for _, kind in _HANDLERS)
