"""One HTTP request and its response: ASGI messages on one side, the connection on the other."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from leanserve.asgi.messages import (
    App,
    AppService,
    ExchangeRecord,
    Message,
    base_scope,
    call_app,
    cancel_task,
    is_disconnect,
)
from leanserve.asgi.states import (
    BodyMachine,
    BodyMove,
    BodyState,
    ResponseMachine,
    ResponseMove,
    ResponseState,
)
from leanserve.errors import AppProtocolError, ClientDisconnected, RemoteProtocolError
from leanserve.protocol.events import Headers, Request
from leanserve.protocol.responses import Framing, check_headers, check_trailers
from leanserve.transport.connection import Connection

__all__ = ["HttpExchange"]

logger = logging.getLogger("leanserve")


class HttpExchange:
    """Built when a request head is complete; lives until the application has returned."""

    __slots__ = (
        "body", "connection", "held", "news", "record", "request", "response", "service", "started",
        "task", "undelivered", "unread_limit",
    )  # fmt: skip

    def __init__(self, service: AppService, connection: Connection, request: Request, app: App) -> None:
        self.service = service
        self.connection = connection
        self.request = request
        self.response = ResponseMachine()
        self.body = BodyMachine()
        self.undelivered = bytearray()
        self.unread_limit = service.settings.flow.receive_high_water
        self.news: asyncio.Event | None = None
        self.held: tuple[int, Headers, bool] = (0, [], False)
        self.started = time.monotonic()  # not loop.time(): uvloop's moves in steps of a millisecond
        scope = base_scope(service, connection, request, "http")
        scope["type"] = "http"
        scope["method"] = request.method.decode("ascii")
        scope["extensions"].update(_EXTENSIONS)
        self.record = ExchangeRecord(
            scope["client"],
            scope["method"],
            request.raw_path.decode("latin-1"),
            request.query.decode("latin-1"),
            request.version,
            0,
            0.0,
            None,
            0,
            0,
        )
        # A copy of the context that stood after the lifespan startup, never another request's.
        self.task = service.loop.create_task(self._run(app, scope), context=service.context.copy())
        service.exchange_started(self)

    def __repr__(self) -> str:
        return f"<HttpExchange {self.response.state.name} {self.body.state.name} {self.record.path}>"

    # What the connection tells

    def body_received(self, data: bytes) -> None:
        """Bytes of the request body."""
        self.record.received_bytes += len(data)
        if self.response.state >= ResponseState.DONE or self.body.state is BodyState.CUT:
            return  # nobody will ask for it
        self.undelivered += data
        if len(self.undelivered) > self.unread_limit:
            self.connection.pause_reading()
        self._wake()

    def body_ended(self) -> None:
        """The request is complete."""
        self.body.advance(BodyMove.END)
        self._wake()

    def client_finished(self) -> None:
        """The client has closed its side: gone, or reading still. Sending goes on, receiving ends."""
        if self.body.state is BodyState.ENDED:
            return  # what is here is delivered first; receive() then finds the codec at EOF
        self.body.advance(BodyMove.CUT)
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, or the request broke off."""
        if self.response.state < ResponseState.DONE:
            self.record.cause = self.record.cause or "client_gone"
            if isinstance(exc, RemoteProtocolError):
                self.record.cause = "bad_request"
                self.record.status = self.record.status or exc.status
            self.response.advance(ResponseMove.LOSE)
            self._close_record()
        self.body.advance(BodyMove.CUT)
        self.undelivered.clear()
        self._wake()

    def drain(self) -> None:
        """The server has begun to stop: the exchange runs on, its response will say ``connection: close``."""

    def cancel(self, reason: str) -> None:
        """The server does not wait any longer."""
        self.record.cause = reason
        cancel_task(self.service.loop, self.task, reason)

    # What the application calls

    async def receive(self) -> Message:
        """ASGI receive."""
        while True:
            if self.response.state >= ResponseState.DONE or self.body.state is BodyState.CUT:
                return {"type": "http.disconnect"}
            if self.undelivered or self.body.state is BodyState.ENDED:
                return self._deliver()
            if self.body.state is BodyState.DELIVERED and self.connection.codec.eof:
                return {"type": "http.disconnect"}
            self._ask_for_body()
            self.body.advance(BodyMove.ASK)
            if self.news is None:
                self.news = asyncio.Event()
            self.news.clear()
            await self.news.wait()

    def _ask_for_body(self) -> None:
        """RFC 9110 section 10.1.1: 100 (Continue) asks for the body; a final response may say no instead."""
        unasked = self.body.state is BodyState.UNREAD and self.response.state <= ResponseState.HELD
        if unasked and self.request.expects_continue:
            self.connection.send_interim(100)

    def _deliver(self) -> Message:
        body = bytes(self.undelivered)
        self.undelivered.clear()
        if body:
            self.connection.resume_reading()
        if self.body.state is BodyState.ENDED:
            self.body.advance(BodyMove.DELIVER)
            return {"type": "http.request", "body": body, "more_body": False}
        return {"type": "http.request", "body": body, "more_body": True}

    async def send(self, message: Message) -> None:
        """ASGI send.

        Raises:
            AppProtocolError: a message that ASGI or HTTP does not allow here.
            ClientDisconnected: the client has gone.
        """
        if self.response.state is ResponseState.GONE:
            raise ClientDisconnected("the client has gone")
        if self.response.state is ResponseState.DONE:
            return  # ASGI: after the last body message "any further messages on the channel will be ignored"
        handler = _HANDLERS.get(message["type"])
        if handler is None:
            raise AppProtocolError(f"an HTTP application cannot send {message['type']!r}")
        waiting = handler(self, message)
        if waiting is not None:
            await waiting

    def _start(self, message: Message) -> None:
        if not self.response.accepts(ResponseMove.START):
            raise AppProtocolError("http.response.start was sent twice")
        status = message.get("status")
        if not isinstance(status, int) or not 200 <= status <= 999:
            raise AppProtocolError(f"status {status!r} is not that of a final response")
        headers = check_headers(message.get("headers", ()))
        self.held = (int(status), headers, bool(message.get("trailers", False)))
        self.response.advance(ResponseMove.START)

    def _body(self, message: Message) -> Awaitable[None] | None:
        data = message.get("body", b"")
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise AppProtocolError(f"body must be bytes, not {type(data).__name__}")
        if type(data) is not bytes:
            data = bytes(data)
        more = bool(message.get("more_body", False))
        trailers = self.held[2]
        if self.response.state is ResponseState.HELD:
            self._send_head(data, more=more, trailers=trailers)
        elif self.response.state is ResponseState.STREAMING:
            self.connection.send_body(data, more=more or trailers)
        else:
            raise AppProtocolError("http.response.body before http.response.start or behind the last body")
        if not self._sends_nothing():
            self.record.sent_bytes += len(data)
        if more:
            self.response.advance(ResponseMove.BODY)
        else:
            self.response.advance(ResponseMove.BODY_BEFORE_TRAILERS if trailers else ResponseMove.LAST_BODY)
        return self._after_write()

    def _send_head(self, data: bytes, *, more: bool, trailers: bool) -> None:
        status, headers, _ = self.held
        self.connection.send_response(status, headers, data, more=more, trailers=trailers)
        self.record.status = status
        self.held = (status, [], trailers)  # from here on the list gathers trailers
        self.record.first_byte_s = time.monotonic() - self.started

    def _sends_nothing(self) -> bool:
        """Whether bodies are dropped: HEAD, 204, 205, 304."""
        head = self.connection.codec.response
        return head is not None and head.framing is Framing.NONE

    def _after_write(self) -> Awaitable[None] | None:
        """After each write: a length that does not fit ends all; the end ends the exchange; else what to wait
        for, if anything."""
        head = self.connection.codec.response
        if head is not None and head.fault is not None:
            self._cut("app_error")
            raise AppProtocolError(head.fault)
        if self.response.state is ResponseState.DONE:
            self._finish()
        elif not self.connection.gate.open:
            return self.connection.gate.wait_open()
        return None

    def _trailers(self, message: Message) -> Awaitable[None] | None:
        if self.response.state is not ResponseState.TRAILING:
            raise AppProtocolError(
                "http.response.trailers without trailers=True, or before the end of the body"
            )
        trailers = self.held[1]
        trailers += check_trailers(message.get("headers", ()))
        if not message.get("more_trailers", False):
            self.connection.send_trailers(trailers)
            self.response.advance(ResponseMove.TRAILERS)
            return self._after_write()
        return None

    def _early_hint(self, message: Message) -> None:
        """RFC 8297: 103 with Link headers, before the final head; too late or too old a client: ignored."""
        if self.response.state <= ResponseState.HELD and self.request.version == "1.1":
            links = message.get("links", ())
            if not isinstance(links, Iterable):
                raise AppProtocolError(f"links must be an iterable of bytes, not {type(links).__name__}")
            self.connection.send_interim(103, check_headers((b"link", link) for link in links))

    async def _path(self, message: Message) -> None:
        """The body is a file; it is the whole body."""
        if self.response.state is not ResponseState.HELD:
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
        status, headers, trailers = self.held
        if not any(name == b"content-length" for name, _ in headers):
            self.held = (status, [*headers, (b"content-length", b"%d" % size)], trailers)
        self._send_head(b"", more=True, trailers=False)
        self.response.advance(ResponseMove.BODY)
        if not self._sends_nothing():
            self.record.sent_bytes += size
        await self.connection.send_file(fd, size)
        self.response.advance(ResponseMove.LAST_BODY)
        self._after_write()

    # The end

    async def _run(self, app: App, scope: dict[str, Any]) -> None:
        try:
            # Not kept in a variable: the frames of its traceback lead back to this one (Python 3.13).
            self._end(500, await call_app(app, scope, self.receive, self.send))
        except asyncio.CancelledError:
            self._end(503, None)
            raise
        finally:
            self.service.exchange_ended(self)

    def _end(self, status: int, error: Exception | SystemExit | None) -> None:
        """The application has returned, raised or been cancelled."""
        if error is not None:
            self._log(error)
        state = self.response.state
        if state >= ResponseState.DONE:
            return
        if error is None and self.connection.codec.eof:
            # It was told http.disconnect, and an application may leave on that without a word.
            self._cut("client_gone")
            return
        if error is None and status == 500:
            logger.error("the application returned without completing its response to %s", self._name())
        self.record.cause = self.record.cause or "app_error"
        if state <= ResponseState.HELD:
            self.held = (status, [(b"content-type", b"text/plain; charset=utf-8")], False)
            self._send_head(_BODIES[status], more=False, trailers=False)
            self.record.sent_bytes += len(_BODIES[status])
            self.response.advance(ResponseMove.FAIL)
            self._finish()
        else:
            self._cut(self.record.cause)

    def _log(self, error: Exception | SystemExit) -> None:
        if is_disconnect(error):
            logger.debug("the client left %s before its response was complete", self._name())
        else:
            logger.error("exception in the application at %s", self._name(), exc_info=error)

    def _name(self) -> str:
        return f"{self.record.method} {self.record.path!a}"

    def _cut(self, cause: str) -> None:
        """End a response that has begun so that the client cannot take it for complete."""
        if self.response.state < ResponseState.GONE:
            self.record.cause = cause
            head = self.connection.codec.response
            if head is not None and head.framing is Framing.CLOSE:
                self.connection.reset()  # there, an orderly close would be a proper end
            else:
                self.connection.finish()
            if self.response.state is not ResponseState.DONE:
                self.response.advance(ResponseMove.LOSE)
            self.body.advance(BodyMove.CUT)
            self._close_record()
            self._wake()

    def _finish(self) -> None:
        self._close_record()
        self._wake()
        self.connection.exchange_done()

    def _close_record(self) -> None:
        record = self.record
        record.status = record.status or 499
        record.duration_s = time.monotonic() - self.started
        self.service.exchange_done(record)

    def _wake(self) -> None:
        if self.news is not None:
            self.news.set()


_EXTENSIONS: dict[str, dict[str, Any]] = {
    "http.response.trailers": {},
    "http.response.early_hint": {},
    "http.response.pathsend": {},
}

_BODIES = {500: b"Internal Server Error", 503: b"Service Unavailable"}

_HANDLERS: dict[str, Callable[[HttpExchange, Message], Awaitable[None] | None]] = {
    "http.response.start": HttpExchange._start,
    "http.response.body": HttpExchange._body,
    "http.response.trailers": HttpExchange._trailers,
    "http.response.early_hint": HttpExchange._early_hint,
    "http.response.pathsend": HttpExchange._path,
}
