"""TCP handshakes under way: clients whose SYN the kernel has answered, and whose ACK is on the wire. Linux.

A listener that closes resets them, so whoever closes one asks the kernel whether there are any
(NETLINK_SOCK_DIAG, linux/inet_diag.h).
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import Final

__all__ = ["count_handshakes"]

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST_DUMP: Final = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_SYN_RECV: Final = 1 << 3
_HEADER: Final = struct.Struct("=IHHII")  # length, type, flags, sequence, port
# Family, protocol, states, source port (in network order); the rest is zero, which fits all.
_REQUEST: Final = struct.Struct("=BBxxI2s46x")


def count_handshakes(listener: socket.socket) -> int:
    """How many there are on the port of `listener`.

    Raises:
        OSError: it is not TCP, or the kernel does not tell.
    """
    if sys.platform != "linux" or listener.family not in (socket.AF_INET, socket.AF_INET6):
        raise OSError("not TCP on Linux")
    port = struct.pack("!H", listener.getsockname()[1])
    # A dual-stack socket has handshakes of both families.
    families = {socket.AF_INET, listener.family}
    return sum(_count(family, port) for family in families)


def _count(family: int, port: bytes) -> int:
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, _SYN_RECV, port)
    header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 0, 0)
    found = 0
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as sock:
        sock.settimeout(1.0)  # the kernel answers within the call; never found it to wait
        sock.send(header + request)
        while True:
            data = sock.recv(1 << 16)
            place = 0
            while place + _HEADER.size <= len(data):
                length, kind, *_ = _HEADER.unpack_from(data, place)
                if kind == _NLMSG_ERROR:
                    (code,) = struct.unpack_from("=i", data, place + _HEADER.size)
                    raise OSError(-code, "the kernel does not tell of handshakes")
                if kind == _NLMSG_DONE:
                    return found
                found += 1
                place += (length + 3) & ~3
