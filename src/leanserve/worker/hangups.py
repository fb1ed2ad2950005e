"""Clients that have gone while nobody reads from them."""

from __future__ import annotations

import select
from collections.abc import Iterable

from leanserve.transport.connection import Connection

__all__ = ["find_hangups"]


def find_hangups(connections: Iterable[Connection]) -> list[Connection]:
    """Those that the peer has reset, among the connections that the event loop does not look at: reading is
    paused (more of a body is here than the application wants), or the peer has closed its side.

    One system call for all of them. A peer that has only closed its side is not among the result.
    """
    unseen = {}
    for connection in connections:
        if connection.paused or connection.codec.eof:
            sock = connection.transport.get_extra_info("socket")
            if sock is not None and sock.fileno() >= 0:
                unseen[sock.fileno()] = connection
    if not unseen or not hasattr(select, "poll"):
        return []
    poll = select.poll()
    for fd in unseen:
        poll.register(fd, 0)  # for POLLHUP and POLLERR, which need no asking
    return [unseen[fd] for fd, _ in poll.poll(0)]
