"""Resets of peers from whom nothing is being read.

An event loop tells of a reset only where it reads or writes. A connection whose peer has closed its side, or
from which reading is paused, does neither while the application computes; here its reset is heard all the
same: an epoll of our own, which the event loop watches as it watches a socket.
"""

from __future__ import annotations

import asyncio
import select
from typing import Protocol

__all__ = ["HangupWatch", "Watched", "make_watch"]


class Watched(Protocol):
    """Who wants to know: a connection."""

    transport: asyncio.Transport

    def hung_up(self) -> None:
        """The peer has reset the connection."""

    def half_closed(self) -> None:
        """The peer has closed its side, behind bytes that may not have been read."""


class HangupWatch:
    """Watches connections for a reset, and for an end that nobody reads up to.

    Args:
        loop: calls back in the running loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._watched: dict[int, Watched] = {}
        self._numbers: dict[Watched, int] = {}
        loop.add_reader(self._epoll.fileno(), self._look)

    def watch(self, watched: Watched, *, end: bool = False) -> None:
        """Call its ``hung_up()`` when the peer has reset the connection; once. With `end`, also its
        ``half_closed()`` when the peer has closed its side; once."""
        sock = watched.transport.get_extra_info("socket")
        if sock is not None and watched not in self._numbers and (fd := sock.fileno()) >= 0:
            # EPOLLERR and EPOLLHUP are always told; nothing else is asked for.
            self._epoll.register(fd, select.EPOLLONESHOT | select.EPOLLRDHUP if end else select.EPOLLONESHOT)
            self._watched[fd] = watched
            self._numbers[watched] = fd

    def forget(self, watched: Watched) -> None:
        """Watch no more. The descriptor may be closed by now, and may even be another connection's."""
        fd = self._numbers.pop(watched, -1) if self._numbers else -1
        if fd >= 0 and self._watched.get(fd) is watched:
            del self._watched[fd]
            try:
                self._epoll.unregister(fd)
            except OSError:
                pass  # the kernel has taken it out when it was closed

    def close(self) -> None:
        """Forget all."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._watched.clear()
        self._numbers.clear()

    def _look(self) -> None:
        for fd, events in self._epoll.poll(0):
            watched = self._watched.get(fd)
            if watched is None:
                continue
            if events & (select.EPOLLERR | select.EPOLLHUP):
                self.forget(watched)
                watched.hung_up()
            else:
                self._epoll.modify(fd, select.EPOLLONESHOT)
                watched.half_closed()


def make_watch(loop: asyncio.AbstractEventLoop) -> HangupWatch | None:
    """A watch where the platform has epoll; elsewhere a reset is heard at the next write."""
    return HangupWatch(loop) if hasattr(select, "epoll") else None
