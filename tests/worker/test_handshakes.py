"""leanserve.worker.handshakes: handshakes that the kernel has not finished."""

from __future__ import annotations

import socket
import sys
import threading
import time

import pytest

from leanserve.worker.handshakes import count_handshakes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="NETLINK_SOCK_DIAG: Linux")


def tcp_listener(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    if host == "::":
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((host, 0))
    return sock


def raw_syn(port: int) -> bytes:
    """A TCP header with SYN, for 127.0.0.1, as a client sends it that never sends anything else."""
    import struct

    source, sequence = 54321, 1
    header = struct.pack("!HHIIBBHHH", source, port, sequence, 0, 5 << 4, 0x02, 64240, 0, 0)
    pseudo = socket.inet_aton("127.0.0.1") * 2 + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(header))
    words = struct.unpack(f"!{(len(pseudo) + len(header)) // 2}H", pseudo + header)
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return header[:16] + struct.pack("!H", ~total & 0xFFFF) + header[18:]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::"])
def test_finished_ones_do_not_count(host: str) -> None:
    with tcp_listener(host) as sock:
        sock.listen(5)
        assert count_handshakes(sock) == 0
        target = "127.0.0.1" if host == "::" else host
        with socket.create_connection((target, sock.getsockname()[1]), 5):
            assert count_handshakes(sock) == 0
            sock.accept()[0].close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::"])
def test_one_whose_ack_does_not_come(host: str) -> None:
    try:
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
    except PermissionError:
        pytest.skip("raw sockets need CAP_NET_RAW")
    with raw, tcp_listener(host) as sock:
        sock.listen(5)
        # The kernel, which knows of no such client, answers the SYN-ACK with a reset; so look while they
        # come.
        stop = threading.Event()
        syn = raw_syn(sock.getsockname()[1])

        def knock() -> None:
            while not stop.is_set():
                raw.sendto(syn, ("127.0.0.1", 0))

        knocking = threading.Thread(target=knock)
        knocking.start()
        try:
            end = time.monotonic() + 20
            while not count_handshakes(sock):
                assert time.monotonic() < end
        finally:
            stop.set()
            knocking.join()


def test_unix_sockets_have_none() -> None:
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(OSError, match="not TCP"):
        count_handshakes(sock)
