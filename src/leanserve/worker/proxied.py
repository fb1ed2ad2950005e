"""Accepting from proxies that say for whom they connect: the PROXY protocol, in front of HTTP and of TLS.

The event loop's own servers hand over a connection when TLS is under way, and no event loop takes bytes back.
So here we accept ourselves and look at the header while it stays in the kernel: it is taken out when it is
complete, to the byte, and only then the loop is given the socket.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any, Final

from leanserve.asgi.forwarded import TrustedProxies
from leanserve.errors import RemoteProtocolError
from leanserve.protocol.proxy_header import MAX_HEADER_BYTES, Endpoints, may_be_header, parse_header
from leanserve.settings import Settings

__all__ = ["ProxiedDoor"]

logger = logging.getLogger("leanserve")

# Connections of one listener that are accepted in one turn of the loop.
_PER_TURN: Final = 64
# Connections whose header is awaited; further ones wait in the kernel.
_MOST_AWAITED: Final = 1024
# After accept() has failed (no descriptors left): the kernel would tell us of the same connection at once.
_REST_S: Final = 1.0
# A header in parts is looked at again after this time, then twice this time, and so on.
_LOOK_AGAIN_S: Final = (0.01, 0.64)


class ProxiedDoor:
    """Accepts on listeners in the event loop's place, and reads what stands in front of a connection.

    Args:
        settings: of the PROXY protocol; ``first_byte_timeout`` is how long a header may take.
        take: called with each accepted socket (non-blocking) and the name of its peer.
    """

    def __init__(self, settings: Settings, take: Callable[[socket.socket, Any], None]) -> None:
        proxy = settings.proxy
        self._required = proxy.proxy_protocol == "required"
        self._trusted = TrustedProxies(proxy.proxy_protocol_allow_ips, "proxy_protocol_allow_ips")
        self._seconds = settings.timeouts.first_byte_timeout
        self._take = take
        self._listeners: list[socket.socket] = []
        self._reading = False
        self._resting: asyncio.TimerHandle | None = None
        self._awaited: set[asyncio.Timeout] = set()

    # Accepting

    def open(self, listener: socket.socket) -> None:
        """Accept from `listener`, which listens."""
        listener.setblocking(False)
        self._listeners.append(listener)
        self._stop()
        self._resume()

    def pause(self) -> None:
        """Accept no more."""
        self._stop()
        self._listeners.clear()
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None

    def _end_rest(self) -> None:
        self._resting = None
        self._resume()

    def _resume(self) -> None:
        if not self._reading and self._resting is None and len(self._awaited) < _MOST_AWAITED:
            self._reading = True
            for listener in self._listeners:
                asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _stop(self) -> None:
        if self._reading:
            self._reading = False
            for listener in self._listeners:
                asyncio.get_running_loop().remove_reader(listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_PER_TURN):
            try:
                sock, name = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                logger.error("accept failed: %s", error)
                self._stop()
                self._resting = asyncio.get_running_loop().call_later(_REST_S, self._end_rest)
                return
            self._take(sock, name)

    # Reading

    async def read_header(self, sock: socket.socket, name: Any) -> Endpoints | None:
        """Wait for the header and take it from `sock`; None: the socket's own addresses stand.

        Raises:
            RemoteProtocolError: it is malformed; or it is required, and absent or from somebody not trusted.
            TimeoutError: it did not come in time.
            OSError: the peer has left.
        """
        client = name[:2] if isinstance(name, tuple) else None
        if not self._trusted.trusts(client):
            if self._required:
                raise RemoteProtocolError("a PROXY header is required, and this peer is not trusted with one")
            return None  # nothing is read ahead: a header of this peer is a malformed request
        async with asyncio.timeout(self._seconds) as limit:
            self._awaited.add(limit)
            if len(self._awaited) >= _MOST_AWAITED:
                self._stop()
            try:
                return await self._read(sock)
            finally:
                self._awaited.discard(limit)
                self._resume()

    async def _read(self, sock: socket.socket) -> Endpoints | None:
        pause, longest = _LOOK_AGAIN_S
        while True:
            try:
                data = sock.recv(MAX_HEADER_BYTES, socket.MSG_PEEK)
            except (BlockingIOError, InterruptedError):
                await _wait_readable(sock)
                continue
            if not data:
                raise ConnectionResetError("the peer has left")
            if not self._required and not may_be_header(data):
                return None
            header = parse_header(data)
            if header is not None:
                sock.recv(header.size_bytes)
                return header.endpoints
            # Section 2: the sender "must always ensure that the header is sent at once", we "may be tolerant
            # to partial headers". What stays in the kernel would wake us all the time, so we look by the
            # clock; a peer that has left meanwhile is noticed at the deadline.
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    def hurry(self, seconds: float) -> None:
        """The server stops: a header that is not here by then is not waited for."""
        end = asyncio.get_running_loop().time() + seconds
        for limit in self._awaited:
            when = limit.when()
            if not limit.expired() and (when is None or when > end):
                limit.reschedule(end)


async def _wait_readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        loop.remove_reader(sock)
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(sock, tell)
    try:
        await readable
    finally:
        loop.remove_reader(sock)
