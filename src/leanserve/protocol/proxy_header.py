"""The header of the PROXY protocol, versions 1 and 2: for whom a proxy has connected.

Specification: https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt; sections named here are its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from leanserve.errors import RemoteProtocolError

__all__ = ["MAX_HEADER_BYTES", "Endpoints", "ProxyHeader", "may_be_header", "parse_header"]

#: Section 2: both versions fit in "the smallest TCP segment that any TCP/IP host is required to support".
MAX_HEADER_BYTES: Final = 536
# Section 2.1: "PROXY UNKNOWN" with two addresses of the longest form.
_MAX_LINE_BYTES: Final = 107

_LINE_START: Final = b"PROXY "
_SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_FIXED_BYTES: Final = len(_SIGNATURE) + 4
_PORT = rb"(0|[1-9][0-9]{0,4})"
_LINE = re.compile(
    _LINE_START + rb"(?:UNKNOWN(?: [^\r\n]*)?"
    rb"|TCP(?:4 ([0-9.]+) ([0-9.]+)|6 ([0-9A-Fa-f:.]+) ([0-9A-Fa-f:.]+)) " + _PORT + b" " + _PORT + rb")\r\n"
)
_LOCAL, _PROXY = 0x20, 0x21
_STREAM: Final = 1
# Family to (bytes of its address, bytes of both addresses and both ports); section 2.2.
_INET, _INET6, _UNIX = 1, 2, 3
_SIZES: Final = {_INET: (4, 12), _INET6: (16, 36), _UNIX: (108, 216)}


@dataclass(slots=True, frozen=True)
class Endpoints:
    """Both ends of the connection that the proxy took, typed as ASGI wants them.

    Attributes:
        client: (address, port), None when it came over a unix socket.
        server: (address, port); (path, None) of a unix socket, None when it has no name.
    """

    client: tuple[str, int] | None
    server: tuple[str, int | None] | None


@dataclass(slots=True, frozen=True)
class ProxyHeader:
    """A complete header.

    Attributes:
        size_bytes: how many bytes it took.
        endpoints: None when the connection is the proxy's own (LOCAL) or it does not know (UNKNOWN, a family
            or protocol that we do not serve): the socket's own addresses stand.
    """

    size_bytes: int
    endpoints: Endpoints | None


def may_be_header(data: bytes) -> bool:
    """Whether `data` begins a header of either version, as far as it goes."""
    return any(
        data.startswith(start) or start.startswith(data) for start in (_LINE_START, _SIGNATURE)
    )


def parse_header(data: bytes) -> ProxyHeader | None:
    """The header at the beginning of `data`, or None when more bytes are needed.

    Raises:
        RemoteProtocolError: it is malformed, too long, or there is none.
    """
    if not may_be_header(data):
        raise RemoteProtocolError("no PROXY header")
    return _parse_binary(data) if data.startswith(b"\r") else _parse_line(data)


def _parse_line(data: bytes) -> ProxyHeader | None:
    end = data.find(b"\n", 0, _MAX_LINE_BYTES) + 1
    if not end:
        if len(data) >= _MAX_LINE_BYTES:
            raise RemoteProtocolError("PROXY header without an end")
        return None
    match = _LINE.fullmatch(data, 0, end)
    if match is None:
        raise RemoteProtocolError("malformed PROXY header")
    source4, target4, source6, target6, *ports = match.groups()
    if not ports[0]:
        return ProxyHeader(end, None)
    try:
        if source4:
            source, target = str(IPv4Address(source4.decode())), str(IPv4Address(target4.decode()))
        else:
            source, target = str(IPv6Address(source6.decode())), str(IPv6Address(target6.decode()))
    except ValueError as error:
        raise RemoteProtocolError("PROXY header with a malformed address") from error
    source_port, target_port = map(int, ports)
    if max(source_port, target_port) > 0xFFFF:
        raise RemoteProtocolError("PROXY header with a port above 65535")
    return ProxyHeader(end, Endpoints((source, source_port), (target, target_port)))


def _parse_binary(data: bytes) -> ProxyHeader | None:
    if len(data) < _FIXED_BYTES:
        return None
    command, family, protocol = data[12], data[13] >> 4, data[13] & 0x0F
    size = _FIXED_BYTES + int.from_bytes(data[14:16])
    if command not in (_LOCAL, _PROXY):
        raise RemoteProtocolError("PROXY header of an unknown version or command")
    if size > MAX_HEADER_BYTES:
        raise RemoteProtocolError("PROXY header too long")
    if command == _PROXY and (family > _UNIX or protocol > 2):
        # "other values are unspecified ... and must be rejected as invalid by receivers".
        raise RemoteProtocolError("PROXY header with an unknown family or protocol")
    if len(data) < size:
        return None
    if command == _LOCAL or family not in _SIZES or protocol != _STREAM:
        # LOCAL: "must use the real connection endpoints and discard the protocol block including the family".
        # UNSPEC: "The receiver should ignore address information". UDP: falls back to that.
        return ProxyHeader(size, None)
    address_bytes, needed = _SIZES[family]
    block = data[_FIXED_BYTES:size]
    if len(block) < needed:
        raise RemoteProtocolError("PROXY header too short for its addresses")
    return ProxyHeader(size, _read_addresses(family, block, address_bytes))  # type-length-values are skipped


def _read_addresses(family: int, block: bytes, size: int) -> Endpoints:
    source, target = block[:size], block[size : 2 * size]
    if family == _UNIX:
        path = target.partition(b"\0")[0].decode("utf-8", "replace")
        return Endpoints(None, (path, None) if path else None)
    kind = IPv4Address if family == _INET else IPv6Address
    ports = block[2 * size : 2 * size + 4]
    return Endpoints(
        (str(kind(source)), int.from_bytes(ports[:2])), (str(kind(target)), int.from_bytes(ports[2:]))
    )
