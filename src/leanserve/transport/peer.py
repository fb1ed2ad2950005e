"""Who is at the other end: read once per connection, shared by all its exchanges."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leanserve.transport.tls import describe_tls

if TYPE_CHECKING:
    from leanserve.protocol.proxy_header import Endpoints

__all__ = ["Peer", "describe_peer"]


@dataclass(slots=True)
class Peer:
    """Facts of an accepted connection, typed as ASGI wants them.

    Attributes:
        client: (address, port) of the peer, None on a unix socket.
        server: (address, port) that it connected to; (path, None) on a unix socket.
        tls: the ``tls`` extension, None on a plain connection.
    """

    client: tuple[str, int] | None
    server: tuple[str, int | None] | None
    tls: dict[str, Any] | None


def describe_peer(
    transport: asyncio.Transport, server_cert: str | None, endpoints: Endpoints | None = None
) -> Peer:
    """Read the addresses and the TLS facts, and set TCP_NODELAY. `endpoints`: what a trusted proxy has said.

    A peer that has left before we look gives addresses of None (CVE-2024-49769: waitress span on that).
    """
    fact = transport.get_extra_info
    if type(transport) not in _without_delay:
        if type(transport).__module__.startswith("uvloop"):  # which has set it, on every TCP transport
            _without_delay.add(type(transport))
        else:
            _set_nodelay(fact("socket"))
    ssl_object = fact("ssl_object")
    return Peer(
        _address(fact("peername")) if endpoints is None else endpoints.client,
        _server(fact("sockname")) if endpoints is None else endpoints.server,
        None if ssl_object is None else describe_tls(ssl_object, server_cert),
    )


_without_delay: set[type] = set()


def _set_nodelay(sock: socket.socket | None) -> None:
    """Not left to asyncio, which skips sockets whose listener was inherited with proto 0: then Nagle's
    algorithm and the peer's delayed ACK cost 40 ms per response of two writes."""
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            pass  # reset before we looked; connection_lost follows


def _address(name: Any) -> tuple[str, int] | None:
    if not isinstance(name, tuple) or len(name) < 2:
        return None
    return name if len(name) == 2 else (name[0], name[1])  # what is behind them is IPv6's


def _server(name: Any) -> tuple[str, int | None] | None:
    return (name, None) if isinstance(name, str) and name else _address(name)
