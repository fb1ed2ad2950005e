"""What a connection asks of its socket, beside the transport."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct

__all__ = ["close_with_reset", "end_now", "has_input"]


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


def end_now(transport: asyncio.Transport) -> bool:
    """Close our side in the kernel; False where the transport has to say more (TLS) or is gone.

    Both loops do it turns later. Bytes that come in between would be answered with a reset: to their sender,
    a request that was taken and lost.
    """
    sock: socket.socket | None = transport.get_extra_info("socket")
    if sock is None or sock.fileno() < 0 or not transport.can_write_eof():
        return False
    if transport.get_write_buffer_size():
        return False  # the peer is slow to read the last response: the transport ends behind it
    try:
        with socket.socket(fileno=os.dup(sock.fileno())) as same:
            same.shutdown(socket.SHUT_WR)
    except OSError:
        return False  # reset by the peer
    return True


def close_with_reset(transport: asyncio.Transport) -> None:
    """Have the close that comes be an error for the peer and no end: RST instead of FIN."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
