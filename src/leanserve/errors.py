"""Errors, sorted by who is to blame.

LeanserveError
├── SettingsError         the operator: a wrong option, address, certificate or app name (exit code 2)
├── ServerGone            nobody: ``leanserve ctl`` found no server that answers (exit code 1)
├── BootFailed            the application: it could not be imported or started (exit code 3)
├── RemoteProtocolError   the peer broke HTTP or WebSocket, or took too long: answered and closed
├── AppProtocolError      the application sent a wrong ASGI message: raised at that ``await send()``
└── IllegalTransition     us: a state machine was given an input that its table does not allow
ClientDisconnected (OSError)  nobody: the client has gone
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "AppProtocolError",
    "BootFailed",
    "ClientDisconnected",
    "IllegalTransition",
    "LeanserveError",
    "RemoteProtocolError",
    "ServerGone",
    "SettingsError",
]


class LeanserveError(Exception):
    """Root of the errors that leanserve raises itself, but for ClientDisconnected."""


class SettingsError(LeanserveError, ValueError):
    """A setting, address or file given by the operator cannot be used. Exit code 2.

    The message is one line that says what is wrong and what to do.
    """


class BootFailed(LeanserveError):
    """The application could not be imported, built or started. Exit code 3."""


class ServerGone(LeanserveError):
    """Nobody answers on the control socket. Exit code 1."""


class RemoteProtocolError(LeanserveError):
    """The peer broke the protocol, or did not keep up with it.

    Args:
        reason: what was wrong, for the log; never echoed to the peer.
        status: the HTTP status to answer with while the connection speaks HTTP.
        close_code: the WebSocket close code (RFC 6455 section 7.4) once it speaks WebSocket.
        headers: what an HTTP answer has to carry beside its status (a 426 names the protocol it wants).
        cause: why its exchange ends, as the access log and the application are told.
    """

    def __init__(
        self,
        reason: str,
        *,
        status: int = 400,
        close_code: int = 1002,
        headers: Sequence[tuple[bytes, bytes]] = (),
        cause: str = "bad_request",
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status
        self.close_code = close_code
        self.headers = headers
        self.cause = cause


class AppProtocolError(LeanserveError, RuntimeError):
    """The application sent a message that ASGI or HTTP does not allow at this point."""


class IllegalTransition(LeanserveError):
    """A state machine got an input that its table does not know: a bug of leanserve, please report it."""


class ClientDisconnected(OSError):
    """The client has gone: raised by ``send()`` (ASGI spec 2.4: "an OSError subclass")."""
