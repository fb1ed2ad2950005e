"""The load, in a process of its own: keep-alive GETs with six browser headers over a few connections.

    python -m benchmarks.client PORT CONNECTIONS SECONDS

Each connection has one request under way. Loopback only; ends by itself. Prints requests and seconds as JSON.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time

REQUEST = (
    b"GET /hello?name=world HTTP/1.1\r\n"
    b"Host: 127.0.0.1:8000\r\n"
    b"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0\r\n"
    b"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n"
    b"Accept-Language: en-US,en;q=0.5\r\n"
    b"Accept-Encoding: gzip, deflate, br, zstd\r\n"
    b"Connection: keep-alive\r\n"
    b"\r\n"
)
MOST_REQUESTS = 5_000_000


def connect(port: int) -> socket.socket:
    """A connection that has answered once."""
    connection = socket.create_connection(("127.0.0.1", port), 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def answer_size(connection: socket.socket) -> int:
    """Bytes of one answer: all answers of a run have the same length."""
    connection.sendall(REQUEST)
    data = b""
    while not data.endswith(b"Hello, world!"):
        piece = connection.recv(65536)
        if not piece or not b"HTTP/1.1 200".startswith((data + piece)[:12]):
            raise SystemExit(f"not the answer expected: {(data + piece)[:200]!r}")
        data += piece
    return len(data)


def load(port: int, count: int, seconds: float) -> dict[str, float]:
    """Keep `count` connections busy for so many seconds; what was done."""
    connections = {sock.fileno(): sock for sock in (connect(port) for _ in range(count))}
    sizes = {answer_size(connection) for connection in connections.values()}
    if len(sizes) != 1:
        raise SystemExit(f"answers of different lengths: {sizes}")
    size = sizes.pop()
    poller = select.epoll()
    missing = dict.fromkeys(connections, size)
    for descriptor, connection in connections.items():
        poller.register(descriptor, select.EPOLLIN)
        connection.sendall(REQUEST)
    done, begun = 0, time.perf_counter()
    end = begun + seconds
    while (now := time.perf_counter()) < end and done < MOST_REQUESTS:
        for descriptor, _ in poller.poll(1):
            connection = connections[descriptor]
            received = len(connection.recv(65536))
            if not received:
                raise SystemExit("the server closed a kept-alive connection")
            missing[descriptor] -= received
            if missing[descriptor] <= 0:
                done += 1
                missing[descriptor] = size
                connection.send(REQUEST)
    poller.close()
    for connection in connections.values():
        connection.close()
    return {"requests": done, "seconds": now - begun}


if __name__ == "__main__":
    print(json.dumps(load(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))))
