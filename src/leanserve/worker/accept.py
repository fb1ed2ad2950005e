"""Taking connections from listeners, and ceasing to without losing one."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
import struct
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from leanserve.errors import RemoteProtocolError
from leanserve.settings import Settings

if TYPE_CHECKING:
    from leanserve.worker.proxied import ProxiedDoor

__all__ = ["Acceptor"]

logger = logging.getLogger("leanserve")

# Time for handshakes under way: the kernel has answered a SYN, and the ACK is still on the wire.
_SETTLE_S = 0.05
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
    """

    def __init__(
        self,
        factory: Callable[..., asyncio.Protocol],
        settings: Settings,
        listeners: Sequence[socket.socket],
        context: ssl.SSLContext | None,
        complain: Callable[..., None] = logger.info,
    ) -> None:
        self._factory = factory
        self._backlog = settings.listen.backlog
        listen = settings.listen
        # Inherited sockets may serve others, and will when we are gone.
        self._lent = (listen.fd is not None) + sum(bind.startswith("fd:") for bind in listen.bind)
        self._listeners = list(listeners)
        self._servers: list[asyncio.AbstractServer] = []
        self._adopting: set[asyncio.Task[None]] = set()
        self._complain = complain
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
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            listener.listen(self._backlog)
            if self._door is not None:
                self._door.open(listener)
                continue
            # The loop closes what it is given; the slot's socket has to outlive this worker.
            sock = listener.dup()
            if sock.family == getattr(socket, "AF_UNIX", None):
                server = await loop.create_unix_server(
                    self._factory, sock=sock, backlog=self._backlog, **self._unix_extra(), **self._tls
                )
            else:
                server = await loop.create_server(
                    self._factory, sock=sock, backlog=self._backlog, **self._tls
                )
            self._servers.append(server)

    def _unix_extra(self) -> dict[str, Any]:
        # From Python 3.13 on both loops unlink the socket file when a unix server closes; it is not this
        # worker's file.
        return {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}

    def pause(self) -> None:
        """Accept no more; the kernel goes on queueing for whoever else holds the listeners."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        if self._door is not None:
            self._door.pause()

    @property
    def busy(self) -> bool:
        """Whether accepted sockets are not connections yet: a PROXY header or a TLS handshake is awaited."""
        return bool(self._adopting)

    async def close(self, keep: int = 0) -> None:
        """Accept what the kernel has queued, then refuse: no client that got through is reset.

        Args:
            keep: how many of the listeners, the last ones, are only paused: others accept from them.

        Closing a listener resets the connections in its queue. So new SYNs are dropped first (the client
        sends them again a second later, and is then refused), handshakes under way get time to end, the
        queue is emptied, and only then the socket stops listening.
        """
        self.pause()
        for _ in range(_ARRIVAL_TURNS):
            await asyncio.sleep(0)
        ours = self._listeners[: max(len(self._listeners) - max(keep, self._lent), 0)]
        filtered = [_drop_new_connections(listener) for listener in ours]
        self._empty(ours)
        if any(filtered):
            await asyncio.sleep(_SETTLE_S)
            self._empty(ours)
        if self._door is not None:
            self._door.hurry(self._drain_idle_s)
        if self._adopting:
            await asyncio.wait(self._adopting, timeout=_HANDSHAKES_S)
        for listener in ours:
            try:
                listener.shutdown(socket.SHUT_RDWR)  # for all who hold a copy of it
            except OSError:
                pass  # not on every platform for a listening socket; the owner closes it

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


# linux/filter.h: a classic BPF program on the TCP header: drop if SYN is set, else pass.
_SO_ATTACH_FILTER = 26
_SYN_FILTER = (
    struct.pack("HBBI", 0x30, 0, 0, 13)  # ldb [13]: the flags
    + struct.pack("HBBI", 0x45, 0, 1, 0x02)  # jset #SYN, next, next+1
    + struct.pack("HBBI", 0x06, 0, 0, 0)  # ret #0: drop
    + struct.pack("HBBI", 0x06, 0, 0, 0xFFFFFFFF)  # ret #-1: pass
)


def _drop_new_connections(listener: socket.socket) -> bool:
    """Have the kernel drop SYNs to `listener`; False where that cannot be done."""
    if sys.platform != "linux" or listener.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    import ctypes

    program = ctypes.create_string_buffer(_SYN_FILTER)
    fprog = struct.pack("HP", len(_SYN_FILTER) // 8, ctypes.addressof(program))
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
    except OSError as error:
        logger.debug("no SYN filter on the listener: %s", error)
        return False
    return True
