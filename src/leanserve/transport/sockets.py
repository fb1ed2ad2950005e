"""What a connection asks of its socket, beside the transport."""

from __future__ import annotations

import asyncio
import select
import socket
import struct

__all__ = ["close_with_reset", "has_input"]


def has_input(transport: asyncio.Transport) -> bool:
    """Whether bytes wait in the kernel: one look, no read."""
    sock: socket.socket | None = transport.get_extra_info("socket")
    if sock is None or sock.fileno() < 0:
        return False
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([sock.fileno()], [], [], 0)[0])


def close_with_reset(transport: asyncio.Transport) -> None:
    """Have the close that comes be an error for the peer and no end: RST instead of FIN."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
