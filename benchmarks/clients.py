"""The clients, the same for every server, each in a process of its own.

    python -m benchmarks.clients KIND PORT JSON

Loopback only, raw sockets, bounded in time and count. A client opens its connections, writes `ready`, waits
for a line on stdin, works, and writes what it did as JSON. What is still under way when the time is over is
waited for, so that the count is exact.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

GET = (
    b"GET /hello?name=world HTTP/1.1\r\n"
    b"Host: 127.0.0.1:8000\r\n"
    b"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0\r\n"
    b"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n"
    b"Accept-Language: en-US,en;q=0.5\r\n"
    b"Accept-Encoding: gzip, deflate, br, zstd\r\n"
    b"Connection: %s\r\n"
    b"\r\n"
)
# No line of it comes twice. `connection: keep-alive` could only repeat, so the sixth header is another one.
DIFFERENT = (
    b"GET /hello?name=world%d HTTP/1.1\r\n"
    b"Host: a%d.example.com:8000\r\n"
    b"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.%d\r\n"
    b"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8,a/b%d\r\n"
    b"Accept-Language: en-US,en;q=0.5,x-%d\r\n"
    b"Accept-Encoding: gzip, deflate, br, zstd, x%d\r\n"
    b"X-Request-Id: %d\r\n"
    b"\r\n"
)
MOST = 5_000_000
MOST_TRANSFERS = 10_000
STALLED_S = 15.0
_MASK = b"\x37\xfa\x21\x3d"  # the mask of RFC 6455 section 5.7
_PORTS_PER_ADDRESS = 20_000
_BATCH = 50  # connections opened together; the smallest backlog of a server is 100


class ClientFailure(Exception):
    """The server did not do what the workload needs."""


def connect(port: int, number: int = 0) -> socket.socket:
    """A connection; from another address of loopback when there are more than one has ports for."""
    block = number // _PORTS_PER_ADDRESS
    source = (f"127.0.0.{1 + block}", 0) if block else None
    connection = socket.create_connection(("127.0.0.1", port), STALLED_S, source_address=source)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def receive(connection: socket.socket, size: int = 65536) -> bytes:
    """What there is. ClientFailure at the end of the stream."""
    data = connection.recv(size)
    if not data:
        raise ClientFailure("the server closed the connection")
    return data


def receive_head(connection: socket.socket, status: bytes = b"200") -> tuple[bytes, bytes]:
    """(the head of a response without its empty line, what came behind it)"""
    data = b""
    while b"\r\n\r\n" not in data:
        data += receive(connection)
    head, _, rest = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 " + status):
        raise ClientFailure(f"not {status.decode()}: {data[:200]!r}")
    return head.lower(), rest


def receive_answer(connection: socket.socket) -> tuple[int, bytes]:
    """One response with a length or in chunks: (its bytes with the head, its body as it was on the wire)"""
    head, body = receive_head(connection)
    _, _, length = head.partition(b"\r\ncontent-length:")
    if length:
        size = int(length.split(b"\r\n")[0])
        while len(body) < size:
            body += receive(connection)
    else:
        while not body.endswith(b"0\r\n\r\n"):
            body += receive(connection)
    return len(head) + 4 + len(body), body


def frame(payload: bytes, opcode: int) -> bytes:
    """A masked, final frame."""
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", 0x80 | opcode, 0x80 | size)
    elif size < 65536:
        head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, size)
    mask = int.from_bytes((_MASK * (size // 4 + 1))[:size], "big")
    return head + _MASK + (int.from_bytes(payload, "big") ^ mask).to_bytes(size, "big")


def plain_frame(payload: bytes, opcode: int) -> bytes:
    """What a server has to send for the same message, in one frame."""
    masked = frame(payload, opcode)
    head = len(masked) - len(payload) - 4
    return bytes([masked[0], masked[1] & 0x7F]) + masked[2:head] + payload


def open_websocket(connection: socket.socket) -> bytes:
    """The handshake; what came behind it."""
    key = base64.b64encode(os.urandom(16))
    connection.sendall(
        b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + key + b"\r\n\r\n"
    )
    return receive_head(connection, b"101")[1]


Work = Callable[[float], dict[str, float]]


def busy(sockets: list[socket.socket], sends: Iterator[bytes], size: int, count: int) -> Work:
    """Keep every connection busy: send, wait for `size` bytes, which are `count` units of work, again."""

    def work(seconds: float) -> dict[str, float]:
        by_number = {connection.fileno(): connection for connection in sockets}
        room = bytearray(262144)  # read into again and again: a client that is slow leaves the server idle
        missing = dict.fromkeys(by_number, size)
        poller = select.epoll()
        for descriptor, connection in by_number.items():
            poller.register(descriptor, select.EPOLLIN)
            connection.sendall(next(sends))
        running, done, begun = len(by_number), 0, time.perf_counter()
        end = begun + seconds
        while running:
            ready = poller.poll(STALLED_S)
            if not ready:
                raise ClientFailure(f"{running} answers are not complete after {STALLED_S} s")
            more = time.perf_counter() < end and done < MOST
            for descriptor, _ in ready:
                connection = by_number[descriptor]
                taken = connection.recv_into(room)
                left = missing[descriptor] - taken
                if not taken or left < 0:
                    raise ClientFailure("the server closed the connection, or its answer is too long")
                if left == 0:
                    done += count
                    left = size
                    if more:
                        connection.sendall(next(sends))
                    else:
                        running -= 1
                missing[descriptor] = left
        return {"count": done, "seconds": time.perf_counter() - begun}

    return work


def http(port: int, connections: int, request: str = "get", depth: int = 1, units: int = 1) -> Work:
    """Requests over kept-alive connections, `depth` at a time, each worth `units`."""
    sends: Iterator[bytes]
    if request == "get":
        sends = itertools.repeat(GET % b"keep-alive" * depth)
    elif request == "different":
        sends = (DIFFERENT % ((number,) * 7) for number in range(100_000, 100_000 + MOST))
    elif request == "json":
        sends = itertools.repeat(_question())
    else:
        sends = itertools.repeat(b"GET %s HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n\r\n" % request.encode())
    sockets = [connect(port) for _ in range(connections)]
    sizes = set()
    for connection in sockets:
        connection.sendall(next(sends))
        sizes.add(receive_answer(connection)[0] if depth == 1 else _pipelined(connection, depth))
    if len(sizes) != 1:
        raise ClientFailure(f"answers of different lengths: {sorted(sizes)}")
    return busy(sockets, sends, sizes.pop(), depth * units)


def _pipelined(connection: socket.socket, depth: int) -> int:
    """The bytes of so many small equal answers in a row."""
    data = b""
    while data.count(b"Hello, world!") < depth:
        data += receive(connection)
    if data.count(b"HTTP/1.1 200") != depth:
        raise ClientFailure(f"not 200 each: {data[:200]!r}")
    return len(data)


def _question() -> bytes:
    """POST of 1 KiB of JSON."""
    content = {
        "model": "small", "text": "", "temperature": 0.5, "stop": ["\n", "END"],
        "weights": [number / 8 for number in range(64)],
    }
    content["text"] = "a" * (1024 - len(json.dumps(content)))
    body = json.dumps(content).encode()
    return (
        b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nUser-Agent: python-httpx/0.28.1\r\n"
        b"Accept: */*\r\nAccept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    ) + body


def websocket(port: int, connections: int, size: int, text: bool = False) -> Work:
    """Messages of `size` bytes that come back, one under way per connection."""
    payload, opcode = (b"a" * size, 1) if text else (bytes(range(256)) * (size // 256 + 1), 2)
    payload = payload[:size]
    sent, expected = frame(payload, opcode), plain_frame(payload, opcode)
    sockets = [connect(port) for _ in range(connections)]
    for connection in sockets:
        data = open_websocket(connection)
        connection.sendall(sent)
        while len(data) < len(expected):
            data += receive(connection, 262144)
        if data != expected:
            raise ClientFailure(f"the echo is another one: {data[:40]!r}")
    return busy(sockets, itertools.repeat(sent), len(expected), 1)


def repeated(transfer: Callable[[float], int], times: int) -> Work:
    """`transfer(end)` moves one body, or what can be moved until `end`: again and again, in MB (10^6)."""

    def work(seconds: float) -> dict[str, float]:
        moved, begun = 0, time.perf_counter()
        for _ in range(times):
            moved += transfer(begun + seconds)
            if time.perf_counter() - begun >= seconds:
                break
        return {"count": moved / 1e6, "seconds": time.perf_counter() - begun}

    return work


def upload(port: int, size: int, times: int = MOST_TRANSFERS) -> Work:
    """Bodies of `size` bytes, by sendfile. When the time is over: what was taken of the last one."""
    block = min(size, 1 << 24)
    memory = os.memfd_create("body")
    os.ftruncate(memory, block)

    def transfer(end: float) -> int:
        with connect(port) as connection:
            connection.sendall(
                b"POST /upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/octet-stream\r\n"
                b"Content-Length: %d\r\n\r\n" % size
            )
            sent = _send_zeros(connection, memory, block, size, end)
            if sent == size:
                answer = receive_answer(connection)[1]
                if int(answer) != size:
                    raise ClientFailure(f"the application counted {answer!r} of {size} bytes")
        return sent

    return repeated(transfer, times)


def _send_zeros(connection: socket.socket, memory: int, block: int, size: int, end: float) -> int:
    """`size` bytes out of a file of `block` zeros; how many were taken until `end`."""
    sent = 0
    poller = select.poll()
    poller.register(connection, select.POLLOUT)
    connection.setblocking(False)
    while sent < size and time.perf_counter() < end:
        if not poller.poll(STALLED_S * 1000):
            raise ClientFailure(f"the server took {sent} bytes and then no more")
        with contextlib.suppress(BlockingIOError):
            start = sent % block
            sent += os.sendfile(connection.fileno(), memory, start, min(block - start, size - sent))
    connection.settimeout(STALLED_S)
    return sent


def download(port: int, size: int, path: str, times: int = MOST_TRANSFERS) -> Work:
    """Bodies of `size` bytes, dropped in the kernel. When the time is over: what came of the last one."""
    room = bytearray(1 << 20)

    def transfer(end: float) -> int:
        with connect(port) as connection:
            connection.sendall(b"GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % path.encode())
            head, rest = receive_head(connection)
            if b"content-length: %d" % size not in head:
                raise ClientFailure(f"another length: {head[:200]!r}")
            got = len(rest)
            while got < size and time.perf_counter() < end:
                taken = connection.recv_into(room, 0, socket.MSG_TRUNC)  # Linux: TCP drops it without a copy
                if not taken:
                    raise ClientFailure(f"the body ended after {got} bytes")
                got += taken
        return got

    return repeated(transfer, times)


def new_connections(port: int, connections: int) -> Work:
    """A connection, one GET, to the end of the stream; so many at a time."""
    request = GET % b"close"

    def work(seconds: float) -> dict[str, float]:
        poller = select.epoll()
        running: dict[int, socket.socket] = {}
        fresh: set[int] = set()  # descriptors whose answer has not begun
        started = done = 0
        begun = time.perf_counter()
        end = begun + seconds
        while True:
            while len(running) < connections and started < MOST and time.perf_counter() < end:
                connection = connect(port)
                connection.sendall(request)
                running[connection.fileno()] = connection
                fresh.add(connection.fileno())
                poller.register(connection, select.EPOLLIN)
                started += 1
            if not running:
                break
            ready = poller.poll(STALLED_S)
            if not ready:
                raise ClientFailure(f"{len(running)} answers are not complete after {STALLED_S} s")
            for descriptor, _ in ready:
                data = running[descriptor].recv(65536)
                if descriptor in fresh:
                    fresh.remove(descriptor)
                    if not data.startswith(b"HTTP/1.1 200"):
                        raise ClientFailure(f"not 200: {data[:200]!r}")
                elif not data:
                    poller.unregister(descriptor)
                    running.pop(descriptor).close()
                    done += 1
        return {"count": done, "seconds": time.perf_counter() - begun}

    return work


def new_tls_connections(port: int, connections: int) -> Work:
    """The same with a full TLS handshake each (no resumption), a thread per connection at a time."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the server's work is the same
    request = GET % b"close"

    def one() -> None:
        with connect(port) as connection, context.wrap_socket(connection) as wrapped:
            wrapped.sendall(request)
            if not wrapped.recv(65536).startswith(b"HTTP/1.1 200"):
                raise ClientFailure("not 200 over TLS")
            while wrapped.recv(65536):
                pass

    def work(seconds: float) -> dict[str, float]:
        done: list[int] = []
        failures: list[BaseException] = []
        begun = time.perf_counter()

        def repeat() -> None:
            count = 0
            try:
                while time.perf_counter() - begun < seconds and count < MOST:
                    one()
                    count += 1
            except (OSError, ClientFailure) as error:
                failures.append(error)
            done.append(count)

        threads = [threading.Thread(target=repeat) for _ in range(connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise ClientFailure(f"TLS: {failures[0]}")
        return {"count": sum(done), "seconds": time.perf_counter() - begun}

    return work


def idle(port: int, connections: int, websockets: bool = False) -> Work:
    """Connections with one answered request, or one handshake, each; nothing more happens on them."""
    request = GET % b"keep-alive"
    sockets: list[socket.socket] = []
    while len(sockets) < connections:
        begin = len(sockets)
        batch = [connect(port, number) for number in range(begin, min(begin + _BATCH, connections))]
        if websockets:
            for connection in batch:
                open_websocket(connection)
        else:
            for connection in batch:
                connection.sendall(request)
            for connection in batch:
                receive_answer(connection)
        sockets += batch

    def work(seconds: float) -> dict[str, float]:
        """The connections that are still open: a server may have closed some."""
        poller = select.poll()
        for connection in sockets:
            poller.register(connection, select.POLLIN)
        return {"count": connections - len(poller.poll(0)), "seconds": seconds}

    return work


CLIENTS: dict[str, Callable[..., Work]] = {
    "http": http, "websocket": websocket, "upload": upload, "download": download, "idle": idle,
    "new_connections": new_connections, "new_tls_connections": new_tls_connections,
}


def main(kind: str, port: str, arguments: str) -> int:
    """Prepare, wait for the word, work. Exit code 1 with one line on stderr when the server fails."""
    options: dict[str, Any] = json.loads(arguments)
    try:
        work = CLIENTS[kind](int(port), **options)
        print("ready", flush=True)
        while line := sys.stdin.readline():  # each line is a time in seconds
            print(json.dumps(work(float(line))), flush=True)
    except (ClientFailure, OSError) as error:
        print(str(error) or repr(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
