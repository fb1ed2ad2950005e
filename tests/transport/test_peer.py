"""leanserve.transport.peer: addresses as ASGI wants them, whatever the transport says."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from leanserve.transport.peer import describe_peer


class Facts:
    """A transport that knows only its extra info."""

    def __init__(self, **info: Any) -> None:
        self.info = info

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.info.get(name, default)


@pytest.mark.parametrize(
    ("peername", "sockname", "client", "server"),
    [
        (("192.0.2.1", 5), ("192.0.2.2", 80), ("192.0.2.1", 5), ("192.0.2.2", 80)),
        (("::1", 5, 0, 0), ("::1", 80, 0, 0), ("::1", 5), ("::1", 80)),
        ("", "/run/sock", None, ("/run/sock", None)),
        ("", "", None, None),
        (b"", b"\0abstract", None, None),
        (None, None, None, None),  # gone before we looked
        ((), (), None, None),
    ],
)
def test_addresses(peername: Any, sockname: Any, client: Any, server: Any) -> None:
    peer = describe_peer(Facts(peername=peername, sockname=sockname), None)  # type: ignore[arg-type]
    assert (peer.client, peer.server, peer.tls) == (client, server, None)


def test_nodelay() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        describe_peer(Facts(socket=sock), None)  # type: ignore[arg-type]
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_socket_that_is_closed_already() -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.close()
    assert describe_peer(Facts(socket=sock), None).client is None  # type: ignore[arg-type]


def test_unix_sockets_have_no_nodelay() -> None:
    ends = socket.socketpair()
    with ends[0], ends[1]:
        assert describe_peer(Facts(socket=ends[0], sockname="/x"), None).server == ("/x", None)  # type: ignore[arg-type]
