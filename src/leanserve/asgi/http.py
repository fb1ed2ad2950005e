"""One HTTP request and its response: ASGI messages on one side, the connection on the other."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Iterable
from time import monotonic
from typing import TYPE_CHECKING, Any

from leanserve.asgi.cancellation import CANCELLATION, cancel_task, cause_of
from leanserve.asgi.messages import (
    App,
    AppService,
    ExchangeRecord,
    Message,
    is_disconnect,
    request_scope,
    run_app,
)
from leanserve.asgi.states import (
    BodyMachine,
    BodyMove,
    BodyState,
    ResponseMachine,
    ResponseMove,
    ResponseState,
)
from leanserve.asgi.timer import ExchangeTimer, find_timeout, too_late
from leanserve.errors import AppProtocolError, ClientDisconnected, RemoteProtocolError
from leanserve.protocol.events import Headers, Request
from leanserve.protocol.responses import REASONS, Framing, check_headers, check_trailers
from leanserve.transport.connection import Connection

if TYPE_CHECKING:
    from leanserve.flight import Berth
    from leanserve.protocol.fastpath import PlainHead

__all__ = ["HTTP_EXTENSIONS", "HttpExchange"]

logger = logging.getLogger("leanserve")


#: What an HTTP application may ask for. With the key of what each request has for itself: in a copy, a key
#: more would cost a new table.
HTTP_EXTENSIONS: dict[str, dict[str, Any]] = {
    "http.response.trailers": {},
    "http.response.early_hint": {},
    "http.response.pathsend": {},
    CANCELLATION: {},
}
_METHODS = {name.encode(): name for name in ("GET", "POST", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS")}
# A look-up in an enum class costs as much as a call; these stand in the path of every request.
_WAITING, _HELD, _STREAMING = ResponseState.WAITING, ResponseState.HELD, ResponseState.STREAMING
_UNHEARD, _DONE = ResponseState.UNHEARD, ResponseState.DONE
_NEXT_BODY, _LAST_BODY = ResponseMove.BODY, ResponseMove.LAST_BODY
_UNREAD, _ENDED, _DELIVERED, _CUT = BodyState.UNREAD, BodyState.ENDED, BodyState.DELIVERED, BodyState.CUT
_END, _DELIVER = BodyMove.END, BodyMove.DELIVER
_RESPONSE, _BODY = ResponseMachine.TABLE, BodyMachine.TABLE
_SAID, _COMPLETE = _RESPONSE[_WAITING, ResponseMove.START], _RESPONSE[_HELD, _LAST_BODY]
_BODYLESS = _BODY[_UNREAD, _END]


class HttpExchange:
    """Built when a request head is complete; lives until the application has returned."""

    __slots__ = (
        "berth", "body", "cancellation", "cause", "client", "connection", "first_byte_s", "headers", "news",
        "piece_s", "plain", "received_bytes", "request", "response", "sent_bytes", "sent_headers", "service",
        "started", "status", "task", "timer", "trailers", "undelivered",
    )  # fmt: skip

    #: Where the flight recorder has noted it.
    berth: Berth | None
    #: The head that waits for the first piece of its body; `plain` is the same as `headers`, when they are.
    #: Behind it, `headers` gathers trailers, if `trailers` has announced them, and the head's own have moved
    #: to `sent_headers`.
    status: int
    headers: Headers
    sent_headers: Headers
    plain: PlainHead | None
    trailers: bool
    #: When the last piece of a streamed body was sent.
    piece_s: float

    def __init__(self, service: AppService, connection: Connection, request: Request, app: App) -> None:
        self.service = service
        self.connection = connection
        self.request = request
        self.response = _WAITING
        self.body = _UNREAD if request.body else _BODYLESS
        self.undelivered: bytes | bytearray = b""
        self.news: asyncio.Event | None = None
        self.status = 0
        self.received_bytes = self.sent_bytes = 0
        self.cause = ""
        self.first_byte_s: float | None = None
        # 0.0: nobody asks. Not loop.time(): uvloop's moves in steps of a millisecond.
        self.started = monotonic() if service.keeps_records or service.tally is not None else 0.0
        scope = request_scope(service, request, connection.peer, "http", service.http_extensions.copy())
        scope["method"] = _METHODS.get(request.method) or request.method.decode("ascii")
        self.client = scope["client"]
        self.cancellation = scope["extensions"][CANCELLATION] = service.cancellation.copy()
        if service.policies is not None:
            self.cancellation["policy"] = service.policies.find(request.raw_path)
        self.timer: ExchangeTimer | None = None
        if service.times_requests or request.timed:
            app = self._start_timer(app)
        # A copy of the context that stood after the lifespan startup, never another request's.
        self.task = service.loop.create_task(run_app(self, app, scope), context=service.context.copy())

    def __repr__(self) -> str:
        return f"<HttpExchange {self.response.name} {self.body.name} {self.request.raw_path!r}>"

    def __str__(self) -> str:
        return self._name()

    # What the connection tells

    def body_received(self, data: bytes) -> None:
        """Bytes of the request body."""
        self.received_bytes += len(data)
        if self.response >= _UNHEARD or self.body is _CUT:
            return  # nobody will ask for it
        if not self.undelivered:
            self.undelivered = data  # one read, one message: handed on as it is
        else:
            if type(self.undelivered) is bytes:
                self.undelivered = bytearray(self.undelivered)
            self.undelivered += data
        if len(self.undelivered) > self.service.settings.flow.receive_high_water:
            self.connection.pause_reading()
            if self.timer is not None:
                self.timer.begin()  # from here on it is the application that keeps the client waiting
        self._wake()

    def body_ended(self) -> None:
        """The request is complete."""
        self._body_move(_END)
        if self.timer is not None:
            self.timer.begin()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, or the request broke off."""
        if self.response < _UNHEARD:
            policy, cause = self.cancellation.get("policy"), self.cause or cause_of(exc)
            self.cause = cause
            if policy == "ignore" and BodyState.ENDED <= self.body <= BodyState.DELIVERED:
                self._lose(ResponseMove.IGNORE)
                self._close_record()
                return  # nothing else is told: what has arrived of the request is all of it
            self.service.client_left(self)
            self._lose()
            if isinstance(exc, RemoteProtocolError):
                self.status = self.status or exc.status
            self._close_record()
            if policy == "cancel":
                self.cancel_now(cause)
        self._body_move(BodyMove.CUT)
        self.undelivered = b""
        self._wake()

    def drain(self) -> None:
        """The server has begun to stop: the exchange runs on, its response will say ``connection: close``."""

    def cancel(self, reason: str) -> None:
        """The server does not wait any longer."""
        self.cause = reason
        if not self.cancel_now(reason) and self.response <= _HELD:
            self._answer(503, reason)

    def cancel_now(self, cause: str) -> bool:
        """Cancel the application, and tell it why; False when it is in a thread, and will hear it later."""
        self.cancellation["cause"] = cause
        return cancel_task(self.service.loop, self.task, cause)

    # Time

    def _start_timer(self, app: App) -> App:
        """Limit the time of this request; gives back what is to answer it."""
        timeout_s = find_timeout(self.request, self.service.settings.request)
        if timeout_s is not None:
            self.cancellation["timeout"] = timeout_s
            if timeout_s <= 0:
                return too_late
        self.timer = ExchangeTimer(self, timeout_s)
        if self.body is _BODYLESS or self.request.expects_continue:
            self.timer.begin()
        return app

    def time_is_up(self) -> None:
        """A limit has passed: 504 while that can still be said, else the response is cut."""
        if self.response >= _UNHEARD:
            if self.response is _UNHEARD:
                self.cancel_now("deadline")
            return
        if self.response <= _HELD:
            self._answer(504, "deadline")
        else:
            self._cut("deadline")
        self.cancel_now("deadline")

    # What the application calls

    async def receive(self) -> Message:
        """ASGI receive."""
        while True:
            if self.response >= _DONE or self.body is _CUT:
                return {"type": "http.disconnect"}
            if self.undelivered or self.body is _ENDED:
                return self._deliver()
            self._ask_for_body()
            self._body_move(BodyMove.ASK)
            if self.news is None:
                self.news = asyncio.Event()
            self.news.clear()
            await self.news.wait()

    def _ask_for_body(self) -> None:
        """RFC 9110 section 10.1.1: 100 (Continue) asks for the body; a final response may say no instead."""
        unasked = self.body is BodyState.UNREAD and self.response <= ResponseState.HELD
        if unasked and self.request.expects_continue:
            self.connection.send_interim(100)
            if self.timer is not None:
                self.timer.rewind()

    def _deliver(self) -> Message:
        body = bytes(self.undelivered)
        if body:
            self.undelivered = b""
            self.connection.resume_reading()
            if self.timer is not None and self.body is not _ENDED:
                self.timer.rewind()
        if self.body is _ENDED:
            self._body_move(_DELIVER)
            return {"type": "http.request", "body": body, "more_body": False}
        return {"type": "http.request", "body": body, "more_body": True}

    async def send(self, message: Message) -> None:
        """ASGI send.

        Raises:
            AppProtocolError: a message that ASGI or HTTP does not allow here.
            ClientDisconnected: the client has gone.
        """
        state = self.response
        kind = message["type"]
        if state is _STREAMING and kind == "http.response.body" and message.get("more_body", False):
            data = message.get("body", b"")
            gate = self.connection.send_piece(data) if type(data) is bytes else None
            if gate is not None:
                self.sent_bytes += len(data)
                if self.timer is not None:
                    self.timer.piece_sent(data)
                if data and self.started:
                    self._count_gap()
                if gate.open:
                    return
                await self._wait(gate.wait_open(), message)
                return
        if state >= _UNHEARD:
            self._send_unheard(message)
            await asyncio.sleep(0)  # who speaks to nobody is never kept waiting: others have their turn
            return
        if kind == "http.response.body":
            waiting = self._body(message)
        elif kind == "http.response.start":
            self._start(message)
            return
        elif (handler := _HANDLERS.get(kind)) is not None:
            waiting = handler(self, message)
        else:
            raise AppProtocolError(f"an HTTP application cannot send {kind!r}")
        if waiting is not None:
            await self._wait(waiting, message)

    async def _wait(self, waiting: Awaitable[None], message: Message) -> None:
        """Wait for a client that has to read first; when it goes meanwhile, `message` is said to nobody."""
        try:
            if self.timer is None:
                await waiting
            else:
                await self.timer.leave_out(waiting)
        except ClientDisconnected:
            if self.response < _UNHEARD:
                raise
            self._send_unheard(message)

    def _send_unheard(self, message: Message) -> None:
        if self.response is ResponseState.GONE:
            raise ClientDisconnected("the client has gone")
        if self.timer is not None and message["type"] != "http.response.start":
            self.timer.said_to_nobody()
        # ASGI: after the last body message "any further messages on the channel will be ignored".
        if self.response is _UNHEARD and _is_last(message):
            self._move(_LAST_BODY)
            self._wake()

    def _start(self, message: Message) -> None:
        if self.response is not _WAITING:
            raise AppProtocolError("http.response.start was sent twice")
        status = message.get("status")
        if not isinstance(status, int) or not 200 <= status <= 999:
            raise AppProtocolError(f"status {status!r} is not that of a final response")
        headers = message.get("headers", ())
        self.trailers = trailers = bool(message.get("trailers", False))
        encoder = self.service.encoder
        self.plain = plain = None if trailers or encoder is None else encoder.check(headers)
        self.headers = plain[2] if plain is not None else check_headers(headers)
        self.status = status
        self.response = _SAID

    def _body(self, message: Message) -> Awaitable[None] | None:
        data = message.get("body", b"")
        if type(data) is not bytes:
            if not isinstance(data, (bytes, bytearray, memoryview)):
                raise AppProtocolError(f"body must be bytes, not {type(data).__name__}")
            data = bytes(data)
        more = message.get("more_body", False)
        if self.timer is not None:
            self.timer.piece_sent(data)
        if self.response is _HELD:
            if not more and self.plain is not None:
                connection = self.connection
                if connection.send_plain(self.status, self.plain, data):
                    self.response = _COMPLETE
                    self.sent_bytes = len(data)
                    if self.started or self.news is not None:
                        self._close_record()
                    connection.next_exchange()
                    return None
            self._send_head(data, more=bool(more))
        elif self.response is _STREAMING:
            if data and self.started:
                self._count_gap()
            self.connection.send_body(data, more=bool(more or self.trailers))
        else:
            raise AppProtocolError("http.response.body before http.response.start or behind the last body")
        if not self._sends_nothing(data):
            self.sent_bytes += len(data)
        if more:
            self.response = _RESPONSE[self.response, _NEXT_BODY]
        else:
            self._move(ResponseMove.BODY_BEFORE_TRAILERS if self.trailers else _LAST_BODY)
        return self._after_write()

    def _send_head(self, data: bytes, *, more: bool) -> None:
        plain = self.plain if more else None
        self.connection.send_response(
            self.status, self.headers, data, more=more, trailers=self.trailers, plain=plain
        )
        if self.timer is not None:
            self.timer.head_sent(self.headers)
        self.sent_headers = self.headers
        self.headers = []  # from here on it gathers trailers
        self.piece_s = monotonic()
        self.first_byte_s = self.piece_s - self.started

    def _count_gap(self) -> None:
        """From one piece of the body to the next, as the application sends them."""
        if (tally := self.service.tally) is not None:
            now = monotonic()
            tally.add_gap(now - self.piece_s)
            self.piece_s = now

    def send_comment(self, data: bytes) -> None:
        """Put `data` between two pieces of the body."""
        if self.response is _STREAMING and self.connection.send_piece(data) is None:
            self.connection.send_body(data, more=True)

    def _sends_nothing(self, data: bytes = b"") -> bool:
        """Whether bodies are dropped: HEAD, 204, 205, 304; said once of one that should not be there."""
        head = self.connection.codec.response
        if head is None or head.framing is not Framing.NONE:
            return False
        if data and self.response is _HELD and self.request.method != b"HEAD":
            logger.warning("a %d has no body: that of %s is dropped", self.status, self._name())
        return True

    def _after_write(self) -> Awaitable[None] | None:
        """After each write: a length that does not fit ends all; the end ends the exchange; else what to wait
        for, if anything."""
        head = self.connection.codec.response
        if head is not None and head.fault is not None:
            self._cut("app_error")
            raise AppProtocolError(head.fault)
        if self.response is _DONE:
            self._finish()
        elif not self.connection.gate.open:
            return self.connection.gate.wait_open()
        return None

    def _trailers(self, message: Message) -> Awaitable[None] | None:
        if self.response is not ResponseState.TRAILING:
            raise AppProtocolError(
                "http.response.trailers without trailers=True, or before the end of the body"
            )
        self.headers += check_trailers(message.get("headers", ()))
        if not message.get("more_trailers", False):
            self.connection.send_trailers(self.headers)
            self._move(ResponseMove.TRAILERS)
            return self._after_write()
        return None

    def _early_hint(self, message: Message) -> None:
        """RFC 8297: 103 with Link headers, before the final head; too late or too old a client: ignored."""
        if self.response <= ResponseState.HELD and self.request.version == "1.1":
            links = message.get("links", ())
            if not isinstance(links, Iterable):
                raise AppProtocolError(f"links must be an iterable of bytes, not {type(links).__name__}")
            self.connection.send_interim(103, check_headers((b"link", link) for link in links))

    async def _path(self, message: Message) -> None:
        """The body is a file; it is the whole body."""
        if self.response is not ResponseState.HELD:
            raise AppProtocolError("http.response.pathsend must follow http.response.start")
        path = message.get("path")
        if not isinstance(path, str) or not os.path.isabs(path):
            raise AppProtocolError(f"pathsend needs an absolute path, not {path!r}")
        # O_NONBLOCK: opening a FIFO would wait for its writer, and with it the whole worker.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
        try:
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode):
                raise AppProtocolError(f"pathsend needs a regular file, not {path!r}")
            await self._send_file(fd, facts.st_size)
        finally:
            os.close(fd)

    async def _send_file(self, fd: int, size: int) -> None:
        if not any(name == b"content-length" for name, _ in self.headers):
            self.headers = [*self.headers, (b"content-length", b"%d" % size)]
            self.plain = None
        self.trailers = False
        self._send_head(b"", more=True)
        self._move(ResponseMove.BODY)
        if not self._sends_nothing():
            self.sent_bytes += size
        await self.connection.send_file(fd, size)
        self._move(ResponseMove.LAST_BODY)
        self._after_write()

    # The end

    def app_returned(self, error: Exception | SystemExit | None) -> None:
        """The application has returned, or raised `error`."""
        if error is not None:
            self._log(error)
        if self.response < _UNHEARD:
            if error is None:
                logger.error(
                    "the application returned without completing its response to %s", self._name()
                )
            self._end(500)

    def app_cancelled(self) -> None:
        """It was cancelled."""
        if self.response < _UNHEARD:
            self._end(503)

    def app_ended(self) -> None:
        """Called behind either; nothing more of this exchange will run."""
        if self.timer is not None:
            self.timer.end()
            self.timer = None  # it knows us
        self.service.exchange_ended(self, self.received_bytes, self.sent_bytes)

    def _end(self, status: int) -> None:
        """Say what the application has left unsaid."""
        cause = self.cause or "app_error"
        if self.response <= _HELD:
            self._answer(status, cause)
        else:
            self._cut(cause)

    def _answer(self, status: int, cause: str) -> None:
        """Our own answer in the place of the application's."""
        body = REASONS[status]
        self.cause, self.status, self.trailers, self.plain = cause, status, False, None
        self.headers = [(b"content-type", b"text/plain; charset=utf-8")]
        self._send_head(body, more=False)
        self.sent_bytes += len(body)
        self._move(ResponseMove.FAIL)
        self._finish()

    def _log(self, error: Exception | SystemExit) -> None:
        if is_disconnect(error):
            logger.debug("the client left %s before its response was complete", self._name())
        else:
            logger.error("exception in the application at %s", self._name(), exc_info=error)

    def _name(self) -> str:
        return f"{self.request.method.decode()} {self.request.raw_path.decode('latin-1')!a}"

    def _cut(self, cause: str) -> None:
        """End a response that has begun so that the client cannot take it for complete."""
        if self.response < ResponseState.GONE:
            self.cause = cause
            codec = self.connection.codec
            head = codec.response
            if head is not None and (head.framing is Framing.CLOSE or codec.eof):
                # An orderly close would be a proper end there, and look like one to many clients where it
                # stands behind the lone zero that asked whether anybody reads.
                self.connection.reset()
            else:
                self.connection.finish()
            if self.response is not ResponseState.DONE:
                self._lose()
            self._body_move(BodyMove.CUT)
            self._close_record()

    def _finish(self) -> None:
        self._close_record()
        self.connection.exchange_done()

    def _close_record(self) -> None:
        if self.started:
            duration_s = monotonic() - self.started
            if (tally := self.service.tally) is not None:
                if self.first_byte_s is None and self.response is _DONE and not self.cause:
                    tally.plain[self.status // 100].append(duration_s)
                else:
                    tally.add(self.status, duration_s, self.first_byte_s, self.cause)
            if self.service.keeps_records:
                self.service.exchange_done(self._make_record(duration_s))
        if self.news is not None:
            self.news.set()

    def _make_record(self, duration_s: float) -> ExchangeRecord:
        request = self.request
        plain = self.response is _DONE and self.first_byte_s is None  # sent in one step
        said = self.headers if plain else () if self.first_byte_s is None else self.sent_headers
        return ExchangeRecord(
            self.client, request.method.decode("ascii"), request.raw_path.decode("latin-1"),
            request.query.decode("latin-1"), request.version, int(self.status) or 499, duration_s,
            duration_s if plain else self.first_byte_s, self.received_bytes, self.sent_bytes, self.cause,
            request.headers, said,
        )  # fmt: skip

    def _move(self, move: ResponseMove) -> None:
        self.response = _RESPONSE[self.response, move]

    def _lose(self, move: ResponseMove = ResponseMove.LOSE) -> None:
        if self.response <= _HELD:
            self.status = 0  # it was said, and never sent
        self._move(move)

    def _body_move(self, move: BodyMove) -> None:
        self.body = _BODY[self.body, move]

    def _wake(self) -> None:
        if self.news is not None:
            self.news.set()


def _is_last(message: Message) -> bool:
    """Whether an application has no more to say behind this, as far as its client would know."""
    kind = message["type"]
    return kind == "http.response.pathsend" or (
        kind == "http.response.body" and not message.get("more_body", False)
    )


_HANDLERS: dict[str, Callable[[HttpExchange, Message], Awaitable[None] | None]] = {
    "http.response.trailers": HttpExchange._trailers,
    "http.response.early_hint": HttpExchange._early_hint,
    "http.response.pathsend": HttpExchange._path,
}
