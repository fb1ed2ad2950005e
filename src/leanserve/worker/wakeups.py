"""Which worker the kernel wakes for a new connection: one that is idle, its own if it can be.

Every worker waits for the queues of all. With EPOLLEXCLUSIVE the kernel walks along those who wait for a
queue and stops at the first that sleeps in its event loop; one that computes is passed over. The slot's own
worker stands first in that row, so who is idle gets what the kernel gave to its slot, and only the
connections of a worker that is busy, or dead, go to siblings.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final

from leanserve.asgi.messages import App

__all__ = ["Wakeups"]

logger = logging.getLogger("leanserve")

# From being woken for a sibling's connection to taking it. One that was only about to take it has taken it by
# then, which keeps a burst of connections where the kernel has put it; one that runs a model has not.
_LOOK_AFTER_S: Final = 0.002
# From accept() to the beginning of the request, if it comes at once; who sends none is not waited for.
_REST_S: Final = 0.001
# The loop hands a new descriptor to its epoll at its next turn.
_TURNS: Final = 5


class Wakeups:
    """The place of one worker among those who wait for connections. Where there is no epoll it does nothing.

    Attributes:
        is_willing: whether the worker takes more than its own connections.
    """

    def __init__(self) -> None:
        self.is_willing = True
        self._siblings: dict[int, list[socket.socket]] = {}
        self._epoll: select.epoll | None = None
        self._own: list[socket.socket] = []
        self._take: Callable[[socket.socket, Any], None] | None = None
        self._noticed: dict[int, None] = {}
        self._looking: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._resting: set[socket.socket] = set()
        self._rest_end: asyncio.TimerHandle | None = None
        self._away = False

    async def begin(
        self, own: Sequence[socket.socket], take: Callable[[socket.socket, Any], None]
    ) -> None:
        """Take the place.

        Args:
            own: sockets that the event loop accepts from.
            take: called with each connection from a sibling's queue and the name of its peer.
        """
        self._take = take
        self._epoll = epoll_of(asyncio.get_running_loop())
        if self._epoll is not None:
            for sock in own:
                if await self._make_exclusive(sock, select.EPOLLIN):
                    self._own.append(sock)

    def watch(self, slot: int, fds: Sequence[int]) -> None:
        """Wait for the queues of a sibling, from the end of the row: its worker is new, or its listeners are.

        Args:
            slot: whose they are.
            fds: listeners, which become ours to close.
        """
        self._drop(slot)
        listeners = [socket.socket(fileno=fd) for fd in fds]
        for listener in listeners:
            listener.setblocking(False)
        self._siblings[slot] = listeners
        task = asyncio.get_running_loop().create_task(self._join_rows(listeners, slot))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _join_rows(self, listeners: Sequence[socket.socket], slot: int) -> None:
        loop = asyncio.get_running_loop()
        for listener in listeners:
            if self._epoll is not None and listener.fileno() >= 0:
                loop.add_reader(listener.fileno(), self._notice, slot)
                # Edge-triggered: we are told of a connection once, and do not turn around while its owner has
                # time.
                await self._make_exclusive(listener, select.EPOLLIN | select.EPOLLET)
                if self._away and self._epoll is not None:
                    _forget(self._epoll, listener)

    def rotate(self, sock: socket.socket) -> None:
        """A connection came from a queue that all have in common: the others have their turns before us, and
        we rest until its request has begun, which may keep us busy."""
        if self._epoll is not None and not self._away and sock in self._own:
            _forget(self._epoll, sock)
            self._resting.add(sock)
            if self._rest_end is None:
                self._rest_end = asyncio.get_running_loop().call_later(_REST_S, self._end_rest)

    def _end_rest(self) -> None:
        if self._rest_end is not None:
            self._rest_end.cancel()
            self._rest_end = None
        rested = list(self._resting)
        self._resting.clear()
        self._renew(rested, select.EPOLLIN)

    def note_calls(self, app: App) -> App:
        """The application; its call ends our rest, but for its first step: who computes in it stays away."""

        async def noted(scope: Any, receive: Any, send: Any) -> None:
            if self._resting:
                asyncio.get_running_loop().call_soon(self._end_rest)
            await app(scope, receive, send)

        return noted

    def look(self, slot: int) -> None:
        """The worker of a slot has died; it may have been woken for connections that it never took."""
        if slot in self._siblings:
            self._notice(slot)

    def _drop(self, slot: int) -> None:
        self._noticed.pop(slot, None)
        for listener in self._siblings.pop(slot, ()):
            asyncio.get_running_loop().remove_reader(listener.fileno())
            listener.close()

    def hand_over(self) -> list[socket.socket]:
        """Leave the rows of the siblings; their listeners are the caller's to empty and to close."""
        listeners = [listener.dup() for found in self._siblings.values() for listener in found]
        for slot in list(self._siblings):
            self._drop(slot)
        return listeners

    # A worker that has enough to do

    def guard(self, app: App, below: int) -> App:
        """The application, while fewer calls than `below` are at work; with more new connections are left to
        others."""
        at_work = 0

        async def guarded(scope: Any, receive: Any, send: Any) -> None:
            nonlocal at_work
            at_work += 1
            if at_work >= below:
                self.leave()
            try:
                await app(scope, receive, send)
            finally:
                at_work -= 1
                if at_work < below:
                    self.come_back()

        return guarded

    def leave(self) -> None:
        """Wait for connections no longer, until :meth:`come_back`."""
        if self._epoll is not None and not self._away:
            self._away = True
            for sock in (*self._own, *self._all_siblings()):
                _forget(self._epoll, sock)

    def come_back(self) -> None:
        """Wait for connections again."""
        if self._epoll is not None and self._away:
            self._away = False
            self._renew([sock for sock in self._own if sock not in self._resting], select.EPOLLIN)
            self._renew(self._all_siblings(), select.EPOLLIN | select.EPOLLET)

    def close(self) -> None:
        """Leave the rows for good."""
        for timer in (self._looking, self._rest_end):
            if timer is not None:
                timer.cancel()
        self._looking = self._rest_end = None
        for slot in list(self._siblings):
            self._drop(slot)
        self._own.clear()
        self._resting.clear()
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None

    # What happens

    def _notice(self, slot: int) -> None:
        self._noticed[slot] = None
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(_LOOK_AFTER_S, self._look)

    def _look(self) -> None:
        """Take one connection from each queue that we were woken for, and look again later: what we have
        taken may be work enough."""
        self._looking = None
        if not self.is_willing:
            self._noticed.clear()
        if self._away:
            return  # coming back, the kernel tells us again
        for slot in list(self._noticed):
            if not self._take_one(slot):
                self._noticed.pop(slot, None)
        if self._noticed:
            self._notice(next(iter(self._noticed)))

    def _take_one(self, slot: int) -> bool:
        for listener in self._siblings.get(slot, ()):
            try:
                sock, name = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                continue
            except OSError as error:
                logger.debug("cannot accept for worker %d: %s", slot + 1, error)
                if error.errno == errno.EINVAL:  # it listens no more, and never will
                    self._drop(slot)
                    return False
                continue
            if self._take is not None:
                self._take(sock, name)
                return True
        return False

    def _all_siblings(self) -> list[socket.socket]:
        return [sock for listeners in self._siblings.values() for sock in listeners]

    def _renew(self, socks: Sequence[socket.socket], events: int) -> None:
        """Go to the end of the row. A queue that is not empty is told of again."""
        if self._epoll is not None and not self._away:
            for sock in socks:
                _forget(self._epoll, sock)
                self._epoll.register(sock.fileno(), events | select.EPOLLEXCLUSIVE)

    async def _make_exclusive(self, sock: socket.socket, events: int) -> bool:
        """Put the loop's own interest in `sock` in the row of those of whom one is woken."""
        for _ in range(_TURNS):
            if self._epoll is None or sock.fileno() < 0:
                return False
            if _forget(self._epoll, sock):
                self._epoll.register(sock.fileno(), events | select.EPOLLEXCLUSIVE)
                return True
            await asyncio.sleep(0)
        logger.debug("%r is not in the event loop's epoll", sock)
        return False


def _forget(epoll: select.epoll, sock: socket.socket) -> bool:
    try:
        epoll.unregister(sock.fileno())
    except (OSError, ValueError):
        return False  # it is not there, or closed
    return True


def epoll_of(loop: asyncio.AbstractEventLoop) -> select.epoll | None:
    """The epoll in which the loop sleeps, under a descriptor of our own; None where it has none or hides it.

    Neither loop promises to show it: without, connections wait for the worker that the kernel has given them
    to.
    """
    if not hasattr(select, "EPOLLEXCLUSIVE"):
        return None
    selector = getattr(loop, "_selector", None)  # asyncio's own
    backend = getattr(selector, "fileno", None) or getattr(loop, "_get_backend_id", None)  # or uvloop's
    if backend is None:
        return None
    return select.epoll.fromfd(os.dup(backend()))
