"""What passes between the supervisor and a worker.

One socket pair per worker, a JSON object per line in both directions. The end of the stream is a message
too: it tells a worker that the supervisor is gone, whatever killed it.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from leanserve.settings import Settings

__all__ = ["Channel", "WorkerSpec"]


@dataclass(slots=True)
class WorkerSpec:
    """All that a new worker process is given.

    Attributes:
        app: an import string, or the application object itself (fork only).
        settings: all settings.
        slot: the worker's place, counted from 0; stable over respawns.
        generation: how many workers this slot has had before.
        listeners: the listening sockets of every slot: ``listeners[slot]`` are this worker's own.
        channel: the worker's end.
        scoreboard_fd: descriptor of the scoreboard page, or -1 (fork inherits the mapping itself).
    """

    app: Any
    settings: Settings
    slot: int
    generation: int
    listeners: list[list[socket.socket]]
    channel: Channel
    scoreboard_fd: int = -1


@dataclass(slots=True)
class Channel:
    """One end of the pair. Non-blocking; ``receive`` yields whole messages only.

    From the worker: ``{"event": "ready", "seconds": 1.2}``, ``{"event": "failed", "error": "...",
    "trace": "..."}``, ``{"event": "full"}`` (limit_max_requests is reached, replace me).
    From the supervisor: ``{"order": "drain"}`` (finish, then leave; the listeners go too),
    ``{"order": "retire"}`` (the same, but a successor holds the listeners), ``{"order": "hurry"}``.
    """

    sock: socket.socket
    _partial: bytearray = field(default_factory=bytearray)

    def fileno(self) -> int:
        """The descriptor, for a selector."""
        return self.sock.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Write one message; silently nothing when the other end has gone (its death is noticed elsewhere)."""
        try:
            self.sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # the reader is dead: the supervisor sees its exit, a worker sees the end of the stream

    def receive(self) -> Iterator[dict[str, Any]]:
        """Yield the messages that have arrived.

        Raises:
            EOFError: the other end has gone.
        """
        while True:
            try:
                data = self.sock.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                raise EOFError
            self._partial += data
            *lines, rest = self._partial.split(b"\n")
            self._partial = bytearray(rest)
            for line in lines:
                yield json.loads(line)

    def close(self) -> None:
        """Close this end."""
        self.sock.close()
