"""What HTTP and WebSocket exchanges have in common: the scope, the record, the call of the application."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from leanserve.asgi.cancellation import Policies
from leanserve.asgi.forwarded import TrustedProxies
from leanserve.errors import ClientDisconnected
from leanserve.protocol.events import Request
from leanserve.settings import Settings
from leanserve.tally import Tally
from leanserve.transport.deadlines import Deadlines
from leanserve.transport.peer import Peer

if TYPE_CHECKING:
    from leanserve.flight import Berth
    from leanserve.protocol.fastframes import FrameRecogniser
    from leanserve.protocol.fastpath import ResponseEncoder

__all__ = [
    "App",
    "AppService",
    "ExchangeRecord",
    "Message",
    "Running",
    "is_disconnect",
    "request_scope",
    "run_app",
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
        cause: why it ended early ("client_gone", "bad_request", "slow_reader", "deadline", "app_error",
            "shutdown"), or "".
        request_headers: as they came; the list itself, no copy.
        response_headers: as the application gave them, names in lower case; none when it gave none.
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
    request_headers: Sequence[tuple[bytes, bytes]] = ()
    response_headers: Sequence[tuple[bytes, bytes]] = ()


class Running(Protocol):
    """An exchange whose application call has not ended. As text it is its method and path.

    Attributes:
        started: monotonic seconds, 0.0 when nobody asked for times as it began.
        berth: where the flight recorder has noted it, if it has.
    """

    task: asyncio.Task[None]
    started: float
    berth: Berth | None

    def _name(self) -> str:
        """Method and path for a log line, without control bytes."""

    def cancel(self, reason: str) -> None:
        """The server does not wait any longer."""

    def cancel_now(self, cause: str) -> bool:
        """Cancel the application, and tell it why; False when it is in a thread, and will hear it later."""


class Caller(Protocol):
    """An exchange as :func:`run_app` knows it; it has no ``task`` before that task is made."""

    async def receive(self) -> Message:
        """ASGI receive."""

    async def send(self, message: Message) -> None:
        """ASGI send."""

    def app_returned(self, error: Exception | SystemExit | None) -> None:
        """The application has returned, or raised `error`."""

    def app_cancelled(self) -> None:
        """It was cancelled."""

    def app_ended(self) -> None:
        """Called behind either; nothing more of this exchange will run."""


class AppService(Protocol):
    """What an exchange asks of its worker, besides what a connection asks of it."""

    settings: Settings
    loop: asyncio.AbstractEventLoop
    deadlines: Deadlines
    proxies: TrustedProxies | None
    root_path: str
    frame_recogniser: FrameRecogniser | None
    #: None: every response goes the planned way.
    encoder: ResponseEncoder | None
    #: What stood after the lifespan startup; each application call gets a copy.
    context: contextvars.Context
    #: The lifespan state; each scope gets a shallow copy.
    state: dict[str, Any]
    #: ASGI extensions of the worker itself, in each scope; and what the scope of an HTTP request has.
    extensions: dict[str, dict[str, Any]]
    http_extensions: dict[str, dict[str, Any]]
    #: What ``leanserve.cancellation`` begins as, and the policies by path if there are any.
    cancellation: dict[str, Any]
    policies: Policies | None
    #: Whether a request has a limit without having asked for one.
    times_requests: bool
    #: Whether anybody reads what ``exchange_done`` is given.
    keeps_records: bool
    #: Where requests are counted; None while nobody reads that.
    tally: Tally | None

    def exchange_ended(self, exchange: Running, received_bytes: int, sent_bytes: int) -> None:
        """The application call has ended, after so many bytes of bodies or messages in either direction."""

    def client_left(self, exchange: Running) -> None:
        """The connection was lost before the response was complete."""

    def exchange_done(self, record: ExchangeRecord) -> None:
        """The response has ended, one way or another."""

    def websocket_opened(self) -> None:
        """A WebSocket handshake was accepted."""

    def websocket_closed(self) -> None:
        """A WebSocket that was open has ended."""


def request_scope(
    service: AppService, request: Request, peer: Peer, kind: str, extensions: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The scope of one request, but for what only one kind has.

    Args:
        service: of the application.
        request: what is asked.
        peer: of the connection.
        kind: "http" or "websocket".
        extensions: those of this kind and of the worker; they become the scope's own.
    """
    raw_path = request.raw_path
    # What is no UTF-8 must not raise, and raw_path keeps the truth.
    path = (_unquote(raw_path) if _PERCENT in raw_path else raw_path).decode("utf-8", "replace")
    if service.root_path and path != "*":
        # Spec: root_path is a prefix of path; the proxy that stripped it has hidden it from raw_path too.
        path = service.root_path + path
        raw_path = service.root_path.encode("utf-8") + raw_path
    schemes = _SCHEMES[kind]
    if peer.tls is not None:
        extensions["tls"] = peer.tls.copy()
    # Applications and middleware write into these; what an extension says of itself is everybody's.
    scope = {
        "type": kind,
        "asgi": _ASGI.copy(),
        "http_version": request.version,
        "scheme": schemes[peer.tls is not None],
        "path": path,
        "raw_path": raw_path,
        "query_string": request.query,
        "root_path": service.root_path,
        "headers": request.headers.copy(),
        "client": peer.client,
        "server": peer.server,
        "state": service.state.copy(),
        "extensions": extensions,
    }
    if request.forwarded and service.proxies is not None:
        # The proxy speaks HTTP of either kind: it says "https" of a WebSocket, too.
        scope["client"], seen = service.proxies.resolve(
            request.headers, peer.client, "http" if peer.tls is None else "https"
        )
        scope["scheme"] = schemes[seen == "https"]
    return scope


def _unquote(path: bytes) -> bytes:
    """ASGI's path: "percent-encoded sequences and UTF-8 byte sequences decoded into characters"."""
    from urllib.parse import unquote_to_bytes  # with the first such path: a hundredth of a start

    return unquote_to_bytes(path)


# As a number: bytes that are asked whether they contain bytes raise and drop an error first (CPython 3.11).
_PERCENT = ord("%")
_ASGI = {"version": "3.0", "spec_version": SPEC_VERSION}
_SCHEMES = {"http": ("http", "https"), "websocket": ("ws", "wss")}


async def run_app(exchange: Caller, app: App, scope: Message) -> None:
    """The task of an exchange: run the application, and tell the exchange how that ended."""
    try:
        if not hasattr(exchange, "task"):
            await asyncio.sleep(0)  # begun inside create_task (an eager task factory): nothing is ready
        await app(scope, exchange.receive, exchange.send)
    except asyncio.CancelledError:
        # Not raised again: kept in the task, its traceback would lead back to this frame.
        exchange.app_cancelled()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - one of the three named places: around the application
        # sys.exit() in a handler is that request's end, not the worker's with all its other requests.
        exchange.app_returned(error)
    else:
        exchange.app_returned(None)
    finally:
        exchange.app_ended()


def is_disconnect(error: BaseException) -> bool:
    """Whether an application ended because its client had gone, also inside an exception group."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_disconnect(inner) for inner in error.exceptions)
    return isinstance(error, ClientDisconnected) or any(
        type(error) is getattr(sys.modules.get(module), name, None) for module, name in _SAID_BY_FRAMEWORKS
    )


# What Starlette (and FastAPI) make of the OSError of send(), and of a disconnect that was received.
_SAID_BY_FRAMEWORKS = (
    ("starlette.requests", "ClientDisconnect"), ("starlette.websockets", "WebSocketDisconnect"),
)  # fmt: skip
