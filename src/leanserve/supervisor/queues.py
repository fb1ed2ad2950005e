"""How many connections the kernel has queued that nobody has accepted yet, by listener."""

from __future__ import annotations

import socket
import struct
import sys
from typing import Any

from leanserve.listeners import Listeners

__all__ = ["measure"]

# linux/tcp.h, struct tcp_info: tcpi_state, then seven bytes and four words that are of no interest here. Of
# a socket that listens, tcpi_unacked is the length of the queue and tcpi_sacked the most that it may have.
_TCP_INFO = struct.Struct("B7x16xII")
_TCP_LISTEN = 10


def measure(listeners: Listeners, slots: int) -> list[dict[str, Any]]:
    """Per TCP socket that listens ``listener``, ``worker`` (0: all share it), ``queued``, ``backlog``.

    Of unix sockets, and on other systems than Linux, the kernel does not say.
    """
    if sys.platform != "linux":
        return []
    found: dict[int, dict[str, Any]] = {}
    for slot in range(slots):
        sockets = listeners.sockets(slot)
        own = len(sockets) - listeners.shared
        for number, sock in enumerate(sockets):
            if sock.fileno() in found or sock.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            data = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
            state, queued, backlog = _TCP_INFO.unpack(data)
            if state == _TCP_LISTEN:
                host, port = sock.getsockname()[:2]
                found[sock.fileno()] = {
                    "listener": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
                    "worker": slot + 1 if number < own else 0, "queued": queued, "backlog": backlog,
                }  # fmt: skip
    return list(found.values())
