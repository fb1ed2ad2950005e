"""WSGI applications (Flask, Django's wsgi.py) in threads, as one ASGI 3 application (PEP 3333).

Input and output stream: the application's ``read`` pulls from the connection, its every block is handed to
the connection before the next one is asked for, so memory stays bounded by the connection's own water marks.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread

from leanserve.asgi.interfaces import Message, Receive, Scope, Send
from leanserve.errors import AppProtocolError, ClientDisconnected

__all__ = ["WsgiAdapter", "build_environ"]

ExcInfo = tuple[type[BaseException], BaseException, TracebackType]
WsgiApp = Callable[..., Iterable[bytes]]

# "Applications and frameworks are forbidden from using HTTP/1.1 hop-by-hop features" (PEP 3333): the framing
# and the life of the connection are ours.
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
     b"transfer-encoding", b"upgrade")
)  # fmt: skip


class WsgiAdapter:
    """An ASGI 3 application that runs a WSGI application in worker threads.

    Args:
        app: the WSGI application.
        threads: how many requests may run in it at the same time; further ones wait.
    """

    def __init__(self, app: WsgiApp, *, threads: int = 40) -> None:
        self._app = app
        self._threads = threads
        # For each event loop its own: with worker_kind=thread several share this object.
        self._limiter = anyio.lowlevel.RunVar[anyio.CapacityLimiter | None]("leanserve_wsgi", None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection scope; WebSockets are refused, lifespan does not exist in WSGI."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # before accept: HTTP 403
        if scope["type"] != "http":
            return
        limiter = self._limiter.get()
        if limiter is None:
            limiter = anyio.CapacityLimiter(self._threads)
            self._limiter.set(limiter)
        call = _Call(scope, receive, send)
        # No thread can be stopped: this task is cancelled behind its end; its next read or write raises.
        await anyio.to_thread.run_sync(call.run, self._app, limiter=limiter)


class _Call:
    """One request in its thread: what PEP 3333 calls start_response and write."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._head: Message | None = None
        self._head_sent = False
        self._missing: int | None = None  # bytes that Content-Length promises and that are still to come
        self._complete = False

    def run(self, app: WsgiApp) -> None:
        """Call the application and send what it yields; runs in a worker thread."""
        environ = build_environ(self._scope)
        environ["wsgi.input"] = io.BufferedReader(_Input(self._receive))
        result = app(environ, self._start_response)
        try:
            for block in result:
                if block:  # "until there is ... a non-empty bytestring", the head waits
                    self._write(block)
            self._finish()
        finally:
            # "If the iterable returned by the application has a close() method, the server must call that
            # method upon completion of the current request", normal or not
            close = getattr(result, "close", None)
            if close is not None:
                close()

    def _start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: ExcInfo | None = None
    ) -> Callable[[bytes], None]:
        if exc_info is not None and self._head_sent:
            # "if exc_info is provided, and the HTTP headers have already been sent, start_response must raise
            # an error, and should re-raise using the exc_info tuple"
            raise exc_info[1].with_traceback(exc_info[2])
        if exc_info is None and self._head is not None:
            raise AppProtocolError("WSGI: start_response was called twice without exc_info")
        encoded = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        self._head = {
            "type": "http.response.start",
            "status": _status_code(status),
            "headers": [pair for pair in encoded if pair[0] not in _HOP_BY_HOP],
        }
        length = dict(encoded).get(b"content-length", b"")
        self._missing = int(length) if length.isdigit() and self._scope["method"] != "HEAD" else None
        return self._write

    def _write(self, block: bytes) -> None:
        if not isinstance(block, bytes):
            raise AppProtocolError(f"WSGI: a block must be bytes, not {type(block).__name__}")
        if self._missing is not None:
            self._missing -= len(block)
        # PEP 3333 forbids to hold a block back to see whether another follows; a known length tells.
        self._emit(block, more=self._missing is None or self._missing > 0)

    def _finish(self) -> None:
        if self._head is None:
            raise AppProtocolError("WSGI: the application returned without calling start_response")
        if not self._complete:
            self._emit(b"", more=False)

    def _emit(self, block: bytes, *, more: bool) -> None:
        if self._head is None:
            raise AppProtocolError("WSGI: the application wrote before it called start_response")
        messages: list[Message] = [] if self._head_sent else [self._head]
        messages.append({"type": "http.response.body", "body": block, "more_body": more})
        self._head_sent = True
        self._complete = not more
        anyio.from_thread.run(self._send_all, messages)

    async def _send_all(self, messages: list[Message]) -> None:
        for message in messages:
            await self._send(message)


def _status_code(status: str) -> int:
    # "a status string of the form '999 Message here'"
    code = status[:3]
    if len(code) == 3 and code.isdigit() and status[3:4] in ("", " "):
        return int(code)
    raise AppProtocolError(f"WSGI: the status must look like '200 OK', not {status!r}")


class _Input(io.RawIOBase):
    """wsgi.input below its buffer: each read takes one ASGI message from the connection."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._rest = memoryview(b"")
        self._more = True

    async def _next(self) -> Message:
        return await self._receive()

    def readable(self) -> bool:
        """The buffer above asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with what has arrived; 0 at the end of the body.

        Raises:
            ClientDisconnected: the client has gone before the end of the body.
        """
        while not self._rest and self._more:
            message = anyio.from_thread.run(self._next)
            if message["type"] == "http.disconnect":
                self._more = False
                raise ClientDisconnected("the client has gone before the end of the body")
            self._rest = memoryview(message.get("body", b""))
            self._more = bool(message.get("more_body", False))
        taken = min(len(buffer), len(self._rest))
        buffer[:taken] = self._rest[:taken]
        self._rest = self._rest[taken:]
        return taken


def build_environ(scope: Scope) -> dict[str, Any]:
    """The WSGI environ of an ASGI http scope, but for ``wsgi.input``."""
    # "native strings": bytes in latin-1 clothes
    root = scope.get("root_path", "").encode().decode("latin-1")
    path = unquote_to_bytes(scope.get("raw_path") or quote(scope["path"])).decode("latin-1")
    server = scope.get("server") or ("localhost", None)
    client = scope.get("client") or ("", None)
    environ: dict[str, Any] = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": root,
        "PATH_INFO": path[len(root) :] if root and _is_below(path, root) else path,
        "QUERY_STRING": scope.get("query_string", b"").decode("latin-1"),
        "SERVER_NAME": str(server[0]),
        "SERVER_PORT": str(server[1] or (443 if scope.get("scheme") == "https" else 80)),
        "SERVER_PROTOCOL": f"HTTP/{scope['http_version']}",
        "REMOTE_ADDR": str(client[0]),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope.get("scheme", "http"),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        "wsgi.input_terminated": True,  # read() ends at the end of the body, also of a chunked one
    }
    if client[1]:
        environ["REMOTE_PORT"] = str(client[1])
    if scope.get("scheme") == "https":
        environ["HTTPS"] = "on"
    environ["REQUEST_URI"] = _request_uri(scope)
    environ.update(_header_variables(scope["headers"]))
    return environ


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _request_uri(scope: Scope) -> str:
    raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    query = scope.get("query_string", b"")
    return (raw + (b"?" + query if query else b"")).decode("latin-1")


def _header_variables(headers: Iterable[tuple[bytes, bytes]]) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for name, value in headers:
        if b"_" in name:
            continue  # X_Forwarded_For would become the same variable as the X-Forwarded-For of the proxy
        key = name.decode("latin-1").upper().replace("-", "_")
        if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
            key = f"HTTP_{key}"
        text = value.decode("latin-1")
        # RFC 9110 section 5.3: several lines are one list; RFC 6265 section 5.4 for cookies
        joint = "; " if key == "HTTP_COOKIE" else ","
        found[key] = f"{found[key]}{joint}{text}" if key in found else text
    return found
