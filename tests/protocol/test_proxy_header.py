"""leanserve.protocol.proxy_header: both versions of the PROXY protocol's header."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanserve.errors import RemoteProtocolError
from leanserve.protocol.proxy_header import Endpoints, ProxyHeader, may_be_header, parse_header

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
V4 = Endpoints(("203.0.113.7", 56324), ("192.0.2.1", 443))
V6 = Endpoints(("2001:db8::7", 56324), ("2001:db8::1", 443))

ENDS = Endpoints(("255.255.255.255", 65535), ("0.0.0.1", 0))


def binary(family: int, block: bytes, *, command: int = 0x21) -> bytes:
    return SIGNATURE + bytes([command, family]) + struct.pack("!H", len(block)) + block


def block(ends: Endpoints) -> bytes:
    assert ends.client is not None
    assert ends.server is not None
    kind = socket.AF_INET6 if ":" in ends.client[0] else socket.AF_INET
    addresses = b"".join(socket.inet_pton(kind, end[0]) for end in (ends.client, ends.server))
    return addresses + struct.pack("!HH", ends.client[1], ends.server[1])  # type: ignore[arg-type]


def unix_block(client: bytes, server: bytes) -> bytes:
    return client.ljust(108, b"\0") + server.ljust(108, b"\0")


GOOD = [
    (b"PROXY TCP4 203.0.113.7 192.0.2.1 56324 443\r\n", V4),
    (b"PROXY TCP6 2001:DB8::7 2001:db8:0:0:0:0:0:1 56324 443\r\n", V6),
    (b"PROXY TCP4 255.255.255.255 0.0.0.1 65535 0\r\n", ENDS),
    (b"PROXY UNKNOWN\r\n", None),
    (b"PROXY UNKNOWN ffff:f \x00\xff anything\r\n", None),
    (b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n", None),
    (binary(0x11, block(V4)), V4),
    (binary(0x21, block(V6)), V6),
    (binary(0x31, unix_block(b"", b"/run/a.sock")), Endpoints(None, ("/run/a.sock", None))),
    (binary(0x31, unix_block(b"/run/c", b"\0abstract")), Endpoints(None, None)),
    (binary(0x31, unix_block(b"c" * 108, b"s" * 108)), Endpoints(None, ("s" * 108, None))),
    # type-length-values are skipped, whatever they say
    (binary(0x11, block(V4) + b"\x04\x00\x03abc"), V4),
    (binary(0x11, block(V4) + b"\xff" * (520 - 12)), V4),
    # LOCAL: the family and the block mean nothing
    (binary(0x00, b"", command=0x20), None),
    (binary(0xFF, b"12345", command=0x20), None),
    (binary(0x11, block(V4), command=0x20), None),
    # unknown, or a protocol that is not ours: the socket's own addresses
    (binary(0x00, b""), None),
    (binary(0x00, b"\x20" * 520), None),
    (binary(0x10, b""), None),
    (binary(0x01, block(V4)), None),
    (binary(0x12, block(V4)), None),
]
BAD = [
    b"GET / HTTP/1.1\r\n", b"\x16\x03\x01", b"\r\nGET", b"PROXYTCP4", b"proxy TCP4", b" PROXY",
    b"PROXY \r\n", b"PROXY TCP4\r\n", b"PROXY TCP4 203.0.113.7 192.0.2.1 56324\r\n",
    b"PROXY TCP4 203.0.113.7 192.0.2.1 56324 443\n", b"PROXY UNKNOWN\n", b"PROXY UNKNOWN a\nb\r\n",
    b"PROXY UNKNOWN a\rb\r\n", b"PROXY UNKNOWNx\r\n", b"PROXY TCP4 203.0.113.7 192.0.2.1 56324 443 \r\n",
    b"PROXY  TCP4 203.0.113.7 192.0.2.1 56324 443\r\n", b"PROXY TCP4 203.0.113.07 192.0.2.1 56324 443\r\n",
    b"PROXY TCP4 203.0.113.7 192.0.2.1 056324 443\r\n", b"PROXY TCP4 203.0.113.7 192.0.2.1 65536 443\r\n",
    b"PROXY TCP4 203.0.113.7 192.0.2.1 1 99999\r\n", b"PROXY TCP4 203.0.113.7 192.0.2.1 -1 443\r\n",
    b"PROXY TCP4 203.0.113 192.0.2.1 1 443\r\n", b"PROXY TCP4 2001:db8::7 2001:db8::1 1 443\r\n",
    b"PROXY TCP6 203.0.113.7 192.0.2.1 1 443\r\n", b"PROXY TCP6 fe80::1%lo fe80::2 1 443\r\n",
    b"PROXY TCP4 203.0.113.256 192.0.2.1 1 443\r\n", b"PROXY UDP4 203.0.113.7 192.0.2.1 1 443\r\n",
    b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n", b"PROXY UNKNOWN " + b"x" * 200,
    binary(0x11, block(V4), command=0x11), binary(0x11, block(V4), command=0x22),
    binary(0x11, block(V4), command=0x2F), binary(0x41, block(V4)), binary(0x13, block(V4)),
    binary(0x11, block(V4)[:-1]), binary(0x21, block(V4)), binary(0x31, b"x" * 215), binary(0x11, b"x" * 521),
    SIGNATURE + b"\x21\x11\xff\xff",
]  # fmt: skip


@pytest.mark.parametrize(("header", "ends"), GOOD)
def test_a_header_is_taken_to_the_byte(header: bytes, ends: Endpoints | None) -> None:
    for behind in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\r\n", header):
        assert parse_header(header + behind) == ProxyHeader(len(header), ends)


@pytest.mark.parametrize(("header", "ends"), GOOD)
def test_a_header_in_parts_is_waited_for(header: bytes, ends: Any) -> None:
    for at in range(len(header)):
        assert may_be_header(header[:at])
        assert parse_header(header[:at]) is None, at


@pytest.mark.parametrize("data", BAD)
def test_what_is_no_header_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_header(data + b"GET / HTTP/1.1\r\n\r\n")


def test_what_must_become_too_long_is_refused_before_it_is() -> None:
    with pytest.raises(RemoteProtocolError):
        parse_header(SIGNATURE + b"\x20\x00" + struct.pack("!H", 521))
    assert parse_header(SIGNATURE + b"\x20\x00" + struct.pack("!H", 520)) is None
    assert parse_header(b"PROXY UNKNOWN".ljust(106)) is None
    with pytest.raises(RemoteProtocolError):
        parse_header(b"PROXY UNKNOWN".ljust(107))


PORTS = st.integers(0, 65535)


@given(
    st.one_of(*(st.tuples(*[st.ip_addresses(v=version).map(str)] * 2) for version in (4, 6))), PORTS, PORTS,
    st.binary(max_size=300), st.binary(max_size=50),
)  # fmt: skip
def test_both_versions_say_the_same(
    addresses: tuple[str, str], source: int, target: int, extra: bytes, behind: bytes
) -> None:
    ends = Endpoints((addresses[0], source), (addresses[1], target))
    version = 6 if ":" in addresses[0] else 4
    line = f"PROXY TCP{version} {addresses[0]} {addresses[1]} {source} {target}\r\n".encode()
    assert parse_header(line + behind) == ProxyHeader(len(line), ends)
    packed = binary(0x21 if version == 6 else 0x11, block(ends) + extra)
    assert parse_header(packed + behind) == ProxyHeader(len(packed), ends)


@given(
    st.one_of(
        st.binary(max_size=60),
        st.binary(max_size=60).map(b"PROXY ".__add__),
        st.binary(max_size=60).map(SIGNATURE.__add__),
        st.tuples(
            st.sampled_from([header for header, _ in GOOD]), st.integers(0, 600), st.binary(max_size=2)
        ).map(lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + 1 :]),
    )
)
def test_any_bytes_at_any_cut(data: bytes) -> None:
    """Refused, waited for or taken; and a byte more never changes what has been decided."""
    decided: Any = None
    for end in range(len(data) + 1):
        try:
            found: Any = parse_header(data[:end])
        except RemoteProtocolError:
            found = "refused"
        assert decided is None or found == decided
        decided = found
        if isinstance(found, ProxyHeader):
            assert found.size_bytes == end
            assert may_be_header(data[:end])
            break
