"""Which process has accepted a connection, as the kernel knows it (sock_diag(7))."""

from __future__ import annotations

import contextlib
import os
import socket
import struct

_SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, _DONE, _ERROR = 20, 0x301, 3, 2
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI")
_STATES = sum(1 << state for state in (1, 4, 5, 8, 9))  # established, and on the way to closed
_PORTS = struct.Struct("!HH")
_CLIENT_AT = 4 + 4 + 16  # of the client's address: four bytes, two ports, our address
_INODE_AT = 4 + 48 + 16  # struct inet_diag_msg: four bytes, inet_diag_sockid, four words, inode
_ANSWER_WITHIN_S = 5.0


Address = tuple[str, int]


def _connections(port: int) -> dict[int, Address]:
    """Socket inode (0 while nobody has accepted it) to the client's address, of the connections to `port`."""
    identity = _PORTS.pack(port, 0) + bytes(44)
    request = _REQUEST.pack(socket.AF_INET, socket.IPPROTO_TCP, 0, _STATES) + identity
    found = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as kernel:  # NETLINK_SOCK_DIAG
        kernel.settimeout(_ANSWER_WITHIN_S)
        size = _HEADER.size + len(request)
        kernel.send(_HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0) + request)
        while True:
            data = kernel.recv(1 << 18)
            while len(data) >= _HEADER.size:
                length, kind, *_ = _HEADER.unpack_from(data)
                if kind == _DONE:
                    return found
                if kind == _ERROR:
                    raise OSError("sock_diag is refused")
                body = data[_HEADER.size : length]
                client = socket.inet_ntoa(body[_CLIENT_AT : _CLIENT_AT + 4]), _PORTS.unpack_from(body, 4)[1]
                found[struct.unpack_from("=I", body, _INODE_AT)[0]] = client
                data = data[(length + 3) & ~3 :]


def accepted(pid: int, port: int) -> set[Address]:
    """The clients of the connections to `port` of 127.0.0.1 that `pid` has accepted.

    Hold still what is looked at (SIGSTOP), or the answer is one of a moment ago.
    """
    inodes = set()
    with contextlib.suppress(OSError):  # it has just ended
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                name = os.readlink(entry.path)
                if name.startswith("socket:["):
                    inodes.add(int(name[8:-1]))
    return {client for inode, client in _connections(port).items() if inode in inodes}
