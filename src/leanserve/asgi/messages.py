"""What HTTP and WebSocket exchanges have in common: the scope, the record, the call of the application."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol, cast
from urllib.parse import unquote_to_bytes

from leanserve.asgi.forwarded import TrustedProxies
from leanserve.errors import ClientDisconnected
from leanserve.protocol.events import Request
from leanserve.settings import Settings
from leanserve.transport.connection import Connection
from leanserve.transport.deadlines import Deadlines

__all__ = [
    "App",
    "AppService",
    "ExchangeRecord",
    "Message",
    "Running",
    "base_scope",
    "call_app",
    "cancel_task",
    "is_disconnect",
]

Message = MutableMapping[str, Any]
App = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]

#: The newest version that the ASGI HTTP & WebSocket specification defines (2024-06-05).
SPEC_VERSION = "2.5"

logger = logging.getLogger("leanserve")


@dataclass(slots=True)
class ExchangeRecord:
    """One finished exchange, for the access log and the counters.

    Attributes:
        client: address of the client as the application saw it, None on a unix socket.
        status: the status sent, 101 for an accepted WebSocket, 499 when the client left before one was sent.
        duration_s: from the complete request head to the end.
        first_byte_s: from the complete request head to the first byte of the response, None without one.
        received_bytes, sent_bytes: of the bodies or messages.
        cause: why it ended early ("client_gone", "bad_request", "app_error", "shutdown"), or "".
    """

    client: tuple[str, int] | None
    method: str
    path: str
    query: str
    version: str
    status: int
    duration_s: float
    first_byte_s: float | None
    received_bytes: int
    sent_bytes: int
    cause: str = ""


class Running(Protocol):
    """An exchange whose application call has not ended."""

    task: asyncio.Task[None]
    record: ExchangeRecord

    def cancel(self, reason: str) -> None:
        """The server does not wait any longer."""


class AppService(Protocol):
    """What an exchange asks of its worker, besides what a connection asks of it."""

    settings: Settings
    loop: asyncio.AbstractEventLoop
    deadlines: Deadlines
    proxies: TrustedProxies | None
    root_path: str

    @property
    def context(self) -> contextvars.Context:
        """What stood after the lifespan startup; each application call gets a copy."""

    @property
    def state(self) -> dict[str, Any]:
        """The lifespan state; each scope gets a shallow copy."""

    def exchange_started(self, exchange: Running) -> None:
        """The application has been called."""

    def exchange_ended(self, exchange: Running) -> None:
        """The application call has ended."""

    def exchange_done(self, record: ExchangeRecord) -> None:
        """The response has ended, one way or another."""


def base_scope(service: AppService, connection: Connection, request: Request, scheme: str) -> dict[str, Any]:
    """The part of the scope that HTTP and WebSocket share. `scheme` is "http" or "ws"."""
    peer = connection.peer
    client = peer.client
    secure = peer.tls is not None
    if service.proxies is not None:
        client, seen = service.proxies.resolve(request.headers, client, "https" if secure else "http")
        secure = seen == "https"
    raw_path = request.raw_path
    # unquote_to_bytes and not unquote: "percent-encoded sequences and UTF-8 byte sequences decoded into
    # characters"; what is no UTF-8 must not raise, and raw_path keeps the truth.
    path = (unquote_to_bytes(raw_path) if b"%" in raw_path else raw_path).decode("utf-8", "replace")
    if service.root_path and path != "*":
        # Spec: root_path is a prefix of path; the proxy that stripped it has hidden it from raw_path too.
        path = service.root_path + path
        raw_path = service.root_path.encode("utf-8") + raw_path
    scope: dict[str, Any] = {
        "type": "",
        "asgi": {"version": "3.0", "spec_version": SPEC_VERSION},
        "http_version": request.version,
        "scheme": scheme + "s" if secure else scheme,
        "path": path,
        "raw_path": raw_path,
        "query_string": request.query,
        "root_path": service.root_path,
        "headers": request.headers,
        "client": client,
        "server": peer.server,
        "state": service.state.copy(),
        "extensions": {},
    }
    if peer.tls is not None:
        scope["extensions"]["tls"] = peer.tls
    return scope


async def call_app(
    app: App,
    scope: Message,
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
) -> Exception | SystemExit | None:
    """Run the application; give back what it raised. Cancellation passes through."""
    try:
        await app(scope, receive, send)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - one of the three named places: around the application
        # sys.exit() in a handler is that request's end, not the worker's with all its other requests.
        return error
    return None


def cancel_task(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None], reason: str) -> None:
    """Cancel an application's task, in the next turn if it has not begun: cancelled before its first step, a
    coroutine does not run at all, not even its ``finally``."""
    coroutine = cast("Coroutine[Any, Any, None]", task.get_coro())
    if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
        loop.call_soon(task.cancel, reason)
    else:
        task.cancel(reason)


def is_disconnect(error: BaseException) -> bool:
    """Whether an application ended because its client had gone, also inside an exception group."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_disconnect(inner) for inner in error.exceptions)
    return isinstance(error, ClientDisconnected)
