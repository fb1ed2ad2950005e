"""The 40 ms trap: Nagle's algorithm against delayed acknowledgements, on a listener that came from outside.

A response in two writes on a kept-alive connection waits about 40 ms for the client's acknowledgement unless
TCP_NODELAY is set on the accepted socket, and an event loop sets it only on sockets that it knows to be TCP.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable

import pytest

from harness import AnswerReader, Serving, listening_socket

_REQUESTS = 40
# The trap costs 40 ms and more, a loopback exchange less than 1.
_LIMIT_S = 0.02


def _median_s(server: Serving) -> float:
    times = []
    with socket.create_connection((server.host, server.port), 10) as connection:
        reader = AnswerReader(connection)
        for _ in range(_REQUESTS):
            begun = time.perf_counter()
            connection.sendall(b"GET /two-writes HTTP/1.1\r\nhost: localhost\r\n\r\n")
            answer = reader.read()
            times.append(time.perf_counter() - begun)
            assert answer is not None
            assert answer.body == b"halffull"
    return statistics.median(times)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_inherited_descriptor(serve: Callable[..., Serving], loop: str) -> None:
    with listening_socket() as listener:
        server = serve("raw_app:app", "--loop", loop, listener=listener)
        assert _median_s(server) < _LIMIT_S
        server.stop()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_own_listener(serve: Callable[..., Serving], loop: str) -> None:
    assert _median_s(serve("raw_app:app", "--loop", loop, "--workers", "2")) < _LIMIT_S
