"""What passes between the supervisor and a worker, or the admin process.

One socket pair per process, a JSON object per line in both directions. The end of the stream is a message
too: it tells a worker that the supervisor is gone, whatever killed it.
"""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from leanserve.option import Frozen
from leanserve.settings import Settings

__all__ = ["DUMP_SIGNAL", "AdminSpec", "Channel", "TemplateSpec", "WorkerSpec"]

#: Has a worker write the stacks of its threads to stderr, whatever its loop is doing. A real-time signal
#: where there are some: applications use the two that are named for users.
DUMP_SIGNAL: int = signal.SIGRTMIN + 5 if hasattr(signal, "SIGRTMIN") else getattr(signal, "SIGUSR2", 0)

# One message's at most: a slot has a listener for each address.
_MAX_FDS = 64
_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_LINE_BYTES = 1 << 20  # far above any message; the supervisor's memory is not the application's to fill


class WorkerSpec(Frozen):
    """All that a new worker process is given.

    Attributes:
        app: an import string, or the application object itself (fork only).
        settings: all settings.
        slot: the worker's place, counted from 0; stable over respawns.
        generation: how many workers this slot has had before.
        listeners: the listening sockets of every slot: ``listeners[slot]`` are this worker's own.
        shared: how many of them, the last ones, the other slots have, too.
        channel: the worker's end.
        scoreboard_fd: descriptor of the scoreboard page, or -1 when there is none.
        tokens: both ends of the pipes that count for all workers: requests at work, requests that wait; or
            none, when nothing is limited.
        lane: which of the slot's two scoreboard records this worker writes.
        loops: how many event loops run in the process, each as a worker in a slot of its own from `slot` on.
        loaded: the application as a template has imported it; never leaves that process.
        parent_pid: the supervisor, to see whether it died before the worker could ask to be told.
        born_s: monotonic time at which the supervisor began to make the process.
    """

    app: Any
    settings: Settings
    slot: int
    generation: int
    listeners: list[list[socket.socket]]
    channel: Channel
    shared: int = 0
    scoreboard_fd: int = -1
    tokens: tuple[tuple[int, int], ...] = ()
    lane: int = 0
    parent_pid: int = 0
    born_s: float = 0.0
    loops: int = 1
    loaded: Any = None

    def facts(self) -> dict[str, Any]:
        """All but the sockets, by name: what another process can be told by pickle."""
        sockets = ("channel", "listeners")
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in sockets}


class AdminSpec(Frozen):
    """All that the admin process is given; the names are those of :class:`WorkerSpec`.

    Attributes:
        listeners: sockets that listen already.
    """

    settings: Settings
    listeners: list[socket.socket]
    channel: Channel
    scoreboard_fd: int
    parent_pid: int


class TemplateSpec(Frozen):
    """All that a template process is given; the names are those of :class:`WorkerSpec`.

    Attributes:
        app: an import string.
        entry: dotted name of what a worker process runs.
        sock: its end of the pair on which workers are asked for.
    """

    app: str
    settings: Settings
    entry: str
    sock: socket.socket
    parent_pid: int


class Channel:
    """One end of the pair. Non-blocking; ``receive`` yields whole messages only.

    From the worker: ``{"event": "loaded"}`` (the application is up: shall I listen?), ``{"event": "ready",
    "seconds": 1.2}``, ``{"event": "failed", "error": "...", "trace": "..."}``, ``{"event": "extend",
    "seconds": 60}`` (it will take longer to be ready), ``{"event": "full"}`` (a limit is reached, replace
    me), ``{"event": "wants"}`` (whether I want connections has changed, see the scoreboard), ``{"event":
    "closed"}`` (I accept no more, and all queues are empty that I was to empty).
    From the supervisor: ``{"order": "open"}`` (listen), ``{"order": "drain"}`` (finish, then leave; the
    listeners go too), ``{"order": "leave"}`` (the same, but listeners that others share stay), ``{"order":
    "retire"}`` (the same, but a successor holds all the listeners), ``{"order": "hurry"}``;
    ``{"set": {"log_level": "debug"}}`` (settings that have changed, and certificates are to be read again);
    ``{"list": 7}``, whose answer is ``{"event": "running", "list": 7, "running": [...], "slot": 0}``: what is
    at work, once for each loop.
    ``{"watch": 2}`` (wait for the queues of slot 2, behind everybody who does; its listeners come with the
    message), ``{"look": 2}`` (its worker has died).

    Between two supervisors during an upgrade: see ``supervisor/upgrade.py``. To the admin process then
    ``{"retire": true}``: another one accepts from its sockets.

    From the admin process: ``{"ask": "workers", "id": 7, "number": 4}``; the answer is
    ``{"id": 7, "ok": true, "text": "..."}``. To it also ``{"dead": 4711}``: the pid of a worker that ended.
    ``{"ask": "list", "id": 8}`` is passed on to all workers, and ``{"id": 8, "worker": 1, "running": [...]}``
    comes from each that answers. ``{"ask": "queues", "id": 9}`` gets ``{"id": 9, "queues": [...]}``.
    """

    __slots__ = ("_fds", "_partial", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._partial = bytearray()
        self._fds: list[int] = []

    def fileno(self) -> int:
        """The descriptor, for a selector."""
        return self.sock.fileno()

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> bool:
        """Write one message; copies of the descriptors come with it. False when the other end has gone; its
        death is noticed elsewhere."""
        try:
            if fds:
                line = json.dumps({**message, "fds": len(fds)}).encode() + b"\n"
                socket.send_fds(self.sock, [line], list(fds))
            else:
                self.sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False  # the supervisor sees the worker's exit, a worker sees the end of the stream
        return True

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Two ends that are connected: the supervisor's and the worker's."""
        ends = socket.socketpair()
        for end in ends:
            end.setblocking(False)
        return cls(ends[0]), cls(ends[1])

    def receive(self) -> Iterator[dict[str, Any]]:
        """Yield the messages that have arrived; ``fds`` of one are descriptors, and now the reader's to
        close.

        Raises:
            EOFError: the other end has gone, or something else than messages is written to this descriptor.
        """
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self.sock, 65536, _MAX_FDS, _CLOEXEC)
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", []
            if not data:
                raise EOFError
            self._partial += data
            self._fds += fds
            *lines, rest = self._partial.split(b"\n")
            self._partial = bytearray(rest)
            if len(rest) > _LINE_BYTES:
                raise EOFError
            for line in lines:
                message = _parse(line)
                if "fds" in message:
                    count = int(message["fds"])
                    message["fds"], self._fds = self._fds[:count], self._fds[count:]
                yield message

    def close(self) -> None:
        """Close this end."""
        self.sock.close()


def _parse(line: bytes | bytearray) -> dict[str, Any]:
    """A message. An application may write to a descriptor not its own; that must not end the parent."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise EOFError from None
    if not isinstance(message, dict):
        raise EOFError
    return message
