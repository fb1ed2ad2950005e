"""The other side of the control socket: finds a server and asks it."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

from leanserve.errors import ServerGone, SettingsError
from leanserve.rendezvous import answers, control_directory, find_controls

__all__ = ["Client", "find_server"]

_ANSWER_S = 20.0


def find_server(pid: int | None, path: str | None) -> str:
    """The path of a control socket: the one that is named, or the only one.

    Raises:
        SettingsError: there are several, and none is named.
        ServerGone: there is none.
    """
    if path is not None:
        return path.removeprefix("unix:")
    found = find_controls()
    if pid is not None:
        found = {each: where for each, where in found.items() if each == pid}
    if len(found) > 1:  # a pid may be another program's by now
        found = {each: where for each, where in found.items() if answers(where)}
    if not found:
        which = "no server" if pid is None else f"no server with pid {pid}"
        raise ServerGone(f"{which} of this user has a socket in {control_directory()}; name it with --socket")
    if len(found) > 1:
        raise SettingsError(f"there are several servers: choose with --pid {' or '.join(map(str, found))}")
    return next(iter(found.values()))


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_ANSWER_S)
        self._path = path

    def connect(self) -> None:
        """As its base, with another address."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Client:
    """Asks one server, each time on a new connection.

    Args:
        path: of its control socket.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def status(self) -> dict[str, Any]:
        """The status as /status has it. Raises ServerGone."""
        found: dict[str, Any] = json.loads(self._ask("GET", "/status"))
        return found

    def order(self, order: str, number: int = 0) -> dict[str, Any]:
        """Give an order; ``ok`` and ``text`` of the answer. Raises ServerGone."""
        found: dict[str, Any] = json.loads(self._ask("POST", f"/orders/{order}?number={number}"))
        return found

    def _ask(self, method: str, target: str) -> bytes:
        connection = _Connection(self.path)
        try:
            connection.request(method, target, headers={"accept": "application/json", "connection": "close"})
            return connection.getresponse().read()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise ServerGone(f"no server answers on {self.path}: {reason}") from None
        finally:
            connection.close()
