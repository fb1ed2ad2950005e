"""Taking connections from listeners, and ceasing to without losing one."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from leanserve.bpf import drop_new_connections
from leanserve.errors import RemoteProtocolError
from leanserve.listeners import Listener
from leanserve.settings import Settings
from leanserve.worker.handshakes import count_handshakes

if TYPE_CHECKING:
    from leanserve.worker.proxied import ProxiedDoor
    from leanserve.worker.wakeups import Wakeups

__all__ = ["Acceptor"]

logger = logging.getLogger("leanserve")

# Handshakes under way are waited for, up to the first of these; for the second where nobody can tell. No
# longer than that: who comes meanwhile sends a SYN that is dropped, and the next one a second later.
_SETTLE_MOST_S, _SETTLE_BLIND_S = 0.5, 0.05
_SETTLE_STEP_S = 0.001
# A connection that the loop has accepted is known to us after some turns: a task of asyncio's makes the
# transport, whose first callback tells us.
_ARRIVAL_TURNS = 5
# What the TLS handshakes of the last connections may take; who needs longer goes on beside the drain.
_HANDSHAKES_S = 1.0


class Acceptor:
    """The listeners of one worker.

    Args:
        factory: makes the protocol of an accepted connection; given the ``Endpoints`` of a PROXY header, if
            there was one.
        settings: backlog and TLS timeouts.
        listeners: bound sockets; ours to listen on, somebody else's to close. Those of inherited descriptors
            are the last ones.
        context: for TLS, or None.
        complain: called as a logger's method about peers that are refused before they are connections.
        wakeups: our place among the workers that accept from the same queues, if there are others.
        shared: how many of the listeners, the last ones, are theirs, too.
    """

    def __init__(
        self,
        factory: Callable[..., asyncio.Protocol],
        settings: Settings,
        listeners: Sequence[socket.socket],
        context: ssl.SSLContext | None,
        complain: Callable[..., None] = logger.info,
        wakeups: Wakeups | None = None,
        shared: int = 0,
    ) -> None:
        self._factory = factory
        self._backlog = settings.listen.backlog
        listen = settings.listen
        # Inherited sockets may serve others, and will when we are gone.
        self._lent = (listen.fd is not None) + sum(bind.startswith("fd:") for bind in listen.bind)
        self._listeners = list(listeners)
        self._servers: list[asyncio.Server] = []
        self._adopting: set[asyncio.Task[None]] = set()
        self._complain = complain
        self._wakeups = wakeups
        self._own = len(self._listeners) - shared
        self._drain_idle_s = settings.drain.drain_idle_timeout
        self._door: ProxiedDoor | None = None
        if settings.proxy.proxy_protocol != "off":
            from leanserve.worker.proxied import ProxiedDoor

            self._door = ProxiedDoor(settings, self._take)
        self._tls: dict[str, Any] = {}
        if context is not None:
            self._tls = {
                "ssl": context,
                "ssl_handshake_timeout": settings.timeouts.tls_handshake_timeout,
                "ssl_shutdown_timeout": settings.timeouts.tls_close_timeout,
            }

    async def open(self) -> None:
        """Listen and accept. Raises OSError."""
        opened = []
        for index, listener in enumerate(self._listeners):
            listener.listen(self._backlog)
            if self._door is not None:
                self._door.open(listener)
                continue
            # The loop closes what it is given; the slot's socket has to outlive this worker.
            sock = listener.dup()
            self._servers.append(await self._serve(sock, is_shared=index >= self._own))
            opened.append(sock)
        if self._wakeups is not None:
            await self._wakeups.begin(opened, self._take)

    async def _serve(self, sock: socket.socket, *, is_shared: bool) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        factory, backlog, wakeups = self._factory, self._backlog, self._wakeups
        if wakeups is not None and is_shared:

            def factory() -> asyncio.Protocol:
                wakeups.rotate(sock)
                return self._factory()

        if wakeups is not None and isinstance(loop, asyncio.SelectorEventLoop) and isinstance(sock, Listener):
            # asyncio accepts that many at a wake-up; one that computes then keeps them from those who are
            # idle.
            sock.least_backlog, backlog = self._backlog, 1
        if sock.family == getattr(socket, "AF_UNIX", None):
            return await loop.create_unix_server(
                factory, sock=sock, backlog=backlog, **self._unix_extra(), **self._tls
            )
        return await loop.create_server(factory, sock=sock, backlog=backlog, **self._tls)

    def _unix_extra(self) -> dict[str, Any]:
        # From Python 3.13 on both loops unlink the socket file when a unix server closes; it is not this
        # worker's file.
        return {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}

    def pause(self) -> None:
        """Accept no more; the kernel goes on queueing for whoever else holds the listeners."""
        if self._wakeups is not None:
            self._wakeups.close()
        for server in self._servers:
            server.close()
        self._servers.clear()
        if self._door is not None:
            self._door.pause()

    @property
    def busy(self) -> bool:
        """Whether accepted sockets are not connections yet: a PROXY header or a TLS handshake is awaited."""
        return bool(self._adopting)

    async def close(self, keep: int = 0, *, all_leave: bool = False) -> None:
        """Accept what the kernel has queued, then refuse: no client that got through is reset.

        Args:
            keep: how many of the listeners, the last ones, are only paused: others accept from them.
            all_leave: so do all siblings, and nobody may be left who empties the queue of one that boots
                or is stuck.

        Closing a listener resets the connections in its queue. So new SYNs are dropped first (the client
        sends them again a second later, and is then refused), handshakes under way get time to end, the
        queue is emptied, and only then the socket stops listening.
        """
        siblings = self._wakeups.hand_over() if all_leave and self._wakeups is not None else []
        await self._settle()
        ours = self._listeners[: max(len(self._listeners) - max(keep, self._lent), 0)]
        filtered = False
        for listener in (*ours, *siblings):
            with suppress(OSError):  # not TCP, or not on Linux
                drop_new_connections(listener)
                filtered = True
        self._empty((*ours, *siblings))
        if filtered:
            await _wait_handshakes(ours)
            self._empty((*ours, *siblings))
        for listener in siblings:
            listener.close()  # it is its worker, or the supervisor, that ends it
        if self._door is not None:
            self._door.hurry(self._drain_idle_s)
        if self._adopting:
            await asyncio.wait(self._adopting, timeout=_HANDSHAKES_S)
        for listener in ours:
            try:
                listener.shutdown(socket.SHUT_RDWR)  # for all who hold a copy of it
            except OSError:
                pass  # not on every platform for a listening socket; the owner closes it

    async def _settle(self) -> None:
        """Accept no more, and let what was accepted become connections."""
        loop = asyncio.get_running_loop()
        if isinstance(loop, asyncio.SelectorEventLoop):
            # asyncio makes the transport in a task, which fails without a word when its server is closed by
            # then, and the connection is reset: so accept no more, let the tasks run, and close the server.
            for sock in (sock for server in self._servers for sock in server.sockets):
                loop.remove_reader(sock)
            for _ in range(_ARRIVAL_TURNS):
                await asyncio.sleep(0)
        self.pause()
        for _ in range(_ARRIVAL_TURNS):
            await asyncio.sleep(0)

    def _empty(self, listeners: Sequence[socket.socket]) -> None:
        """Accept until the queues are empty; a peer that is slow with its TLS handshake holds up nobody."""
        for listener in listeners:
            while True:
                try:
                    sock, name = listener.accept()
                except (BlockingIOError, InterruptedError):
                    break  # empty
                except OSError as error:
                    if error.errno != errno.EINVAL:  # a sibling has shut down the socket that we share
                        logger.warning("accept failed while closing: %s", error)
                    break
                self._take(sock, name)

    def _take(self, sock: socket.socket, name: Any) -> None:
        sock.setblocking(False)
        task = asyncio.get_running_loop().create_task(self._adopt(sock, name))
        self._adopting.add(task)
        task.add_done_callback(self._adopting.discard)

    async def _adopt(self, sock: socket.socket, name: Any) -> None:
        factory = self._factory
        try:
            if self._door is not None and (endpoints := await self._door.read_header(sock, name)) is not None:
                factory = partial(factory, endpoints)
            await asyncio.get_running_loop().connect_accepted_socket(factory, sock, **self._tls)
        except RemoteProtocolError as error:
            self._complain("refused %s: %s", name[0] if isinstance(name, tuple) else "a peer", error.reason)
            sock.close()
        except (OSError, ssl.SSLError, TimeoutError):
            sock.close()  # the peer left, or its handshake failed: what the server would do, too
        except asyncio.CancelledError:
            sock.close()
            raise


async def _wait_handshakes(listeners: Sequence[socket.socket]) -> None:
    """Wait until the clients whose SYN was answered have had time for their ACK."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + _SETTLE_MOST_S
    wait_s = _SETTLE_STEP_S
    for listener in listeners:
        while loop.time() < end_s:
            try:
                if not count_handshakes(listener):
                    break
            except OSError:
                wait_s, end_s = _SETTLE_BLIND_S, 0.0
            await asyncio.sleep(wait_s)
