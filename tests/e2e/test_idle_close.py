"""The end of an idle connection: a request that is too late is told so, and never answered with a reset."""

from __future__ import annotations

import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from harness import Serving

IDLE_S = 0.1
REQUEST = b"GET /pid HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_late_request_sees_the_end(serve: Callable[..., Serving], loop: str) -> None:
    """A reset would say that the server has taken bytes and thrown them away; a FIN that nothing was read."""
    server = serve("raw_app:app", "--keep-alive-timeout", str(IDLE_S), "--loop", loop)

    def late(chance: random.Random) -> str:
        with server.connect() as connection:
            connection.sendall(REQUEST)
            connection.recv(4096)
            time.sleep(IDLE_S + chance.uniform(-0.001, 0.002))
            connection.setblocking(False)
            try:
                return "ended" if not connection.recv(1, socket.MSG_PEEK) else "data"
            except BlockingIOError:
                pass  # not ended yet: as a proxy sees it, good for another request
            connection.settimeout(5)
            try:
                connection.sendall(REQUEST)
                return "served" if connection.recv(4096) else "crossed"
            except BrokenPipeError:
                return "crossed"
            except ConnectionResetError:
                return "reset"

    with ThreadPoolExecutor(16) as pool:
        seen = Counter(pool.map(late, map(random.Random, range(800))))
    assert seen["served"] > 20, seen
    assert seen["ended"] > 20, seen
    assert seen["reset"] == seen["data"] == 0, seen
