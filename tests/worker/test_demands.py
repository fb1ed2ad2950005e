"""Clauses of docs/reference/demands.md on real sockets and both loops, as far as no other test shows them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from harness import Certificates
from leanserve.asgi.http import HttpExchange
from leanserve.errors import ClientDisconnected
from leanserve.settings import Settings
from leanserve.transport.connection import Connection
from leanserve.worker.worker import Worker
from served import CLOSING_GET, GET, LOOPS, Client, eventually, fetch, hello, run, serving, tls_client
from wire import parse
from ws_frames import BINARY, CLOSE, PING, TEXT, close, frame
from ws_frames import parse as parse_frames

START = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body", "body": b"end"}
SHAKE = (
    b"GET / HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
)


@pytest.fixture(params=list(LOOPS))
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def over(certificates: Certificates, tls: bool) -> dict[str, Any]:
    """Settings for a server with or without TLS."""
    if not tls:
        return {}
    return {"ssl_certfile": str(certificates.certificate), "ssl_keyfile": str(certificates.key)}


@asynccontextmanager
async def stream(
    worker: Worker, certificates: Certificates | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A stream pair, over TLS with certificates."""
    if certificates is None:
        pair = await asyncio.open_connection(*worker.addresses[0])
    else:
        pair = await tls_client(worker, certificates.client_context())
    try:
        yield pair
    finally:
        pair[1].close()
        with contextlib.suppress(OSError, ssl.SSLError):
            await pair[1].wait_closed()


both_transports = pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])


# Row 4: the idle timer


def test_an_idle_connection_outlives_that_of_a_proxy() -> None:
    """Row 4: at least 75 seconds; nginx, haproxy and the load balancers of clouds keep 60 or less."""
    assert Settings().timeouts.keep_alive_timeout >= 75


def test_what_crosses_the_idle_timer_is_not_reset(loop: str) -> None:
    """Row 4: when the timer has found nothing, the client is told at once. A request that comes in the rest
    of that turn meets an end that was sent before it, not the reset of a server that drops what it had."""

    async def main() -> None:
        async with serving(hello, linger_timeout=0.1) as worker, await Client.open(worker) as client:
            await client.send(GET)
            await client.read_one()
            (connection,) = worker.connections
            connection.deadline_reached()
            assert client.sock.recv(1) == b""  # it is here before the loop has come round
            await eventually(lambda: not worker.connections)

    run(loop, main)


def test_a_first_request_that_a_busy_loop_has_not_read_yet(loop: str) -> None:
    """Rows 4 and 12: also for the deadline of the first byte, bytes that are here are served."""

    async def main() -> None:
        async with serving(hello) as worker, await Client.open(worker) as client:
            await eventually(lambda: worker.connections)
            (connection,) = worker.connections
            client.sock.send(CLOSING_GET)  # in the kernel, unread by the worker, when the deadline is due
            connection.deadline_reached()
            assert [answer.status for answer in await client.read_all()] == [200]

    run(loop, main)


# Row 11: memory that closed connections keep


def _ours() -> list[object]:
    return [it for it in gc.get_objects() if type(it) in (Connection, HttpExchange)]


async def _rst_within_an_answer(worker: Worker) -> None:
    client = await Client.open(worker)
    await client.send(GET)
    await client.read_one()
    client.reset()


async def _bare_connect(worker: Worker) -> None:
    (await Client.open(worker)).sock.close()


async def _half_a_request(worker: Worker) -> None:
    client = await Client.open(worker)
    request = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nhalf"
    await client.send(request[: 12 + 7 * (client.sock.getsockname()[1] % 6)])
    client.sock.close()


@pytest.mark.parametrize("kind", [_rst_within_an_answer, _bare_connect, _half_a_request])
def test_connections_that_end_badly_leave_nothing(loop: str, kind: Callable[[Worker], Any]) -> None:
    """Row 11: no object, no deadline and no timer, with the cycle collector off; a tenth of the count."""

    async def main() -> None:
        async with serving(hello) as worker:
            for _ in range(50):
                await kind(worker)
            await eventually(lambda: not worker.connections and not worker.running)
            gc.collect()
            older, tasks = set(map(id, _ours())), asyncio.all_tasks()
            gc.disable()
            try:
                for _ in range(2000):
                    await kind(worker)
                await eventually(lambda: not worker.connections and not worker.running)
                await asyncio.sleep(0.05)
                assert set(map(id, _ours())) <= older
                assert len(worker.deadlines) == 0
                assert asyncio.all_tasks() == tasks
                scheduled = getattr(asyncio.get_running_loop(), "_scheduled", [])  # uvloop's are its own
                assert len(scheduled) < 120, "timer handles"
            finally:
                gc.enable()

    run(loop, main)


@pytest.mark.parametrize("whole", [True, False])
def test_a_body_that_is_written_is_let_go(loop: str, whole: bool) -> None:
    """Row 11: no reference of ours, while the application that sent it still runs."""
    done = asyncio.Event()
    left: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await hello(scope, receive, send)
        body = bytes(1 << 20)
        alone = sys.getrefcount(body)
        await send(START)
        await send({"type": "http.response.body", "body": body, "more_body": not whole})
        await done.wait()
        left.append(sys.getrefcount(body) - alone)
        if not whole:
            await send(END)
        return None

    async def main() -> None:
        async with serving(app) as worker, await Client.open(worker) as client:
            await client.send(GET)
            while len(client.received) < 1 << 20:
                await client.read()
            await asyncio.sleep(0.05)
            done.set()
            await eventually(lambda: left)
            assert left == [0]

    run(loop, main)


# Row 12: deadlines of a request


@both_transports
def test_a_byte_now_and_then_does_not_move_the_deadline(
    loop: str, tls: bool, certificates: Certificates
) -> None:
    """Row 12: from the first byte of the head, whatever trickles in behind it; 408, and closed."""

    async def main() -> None:
        flat = {"header_timeout": 0.3, "linger_timeout": 0.1, **over(certificates, tls)}
        async with serving(hello, **flat) as worker:
            async with stream(worker, certificates if tls else None) as (reader, writer):
                for number in range(500):
                    writer.write(GET[:20] if not number else b"x")
                    if reader._buffer:  # type: ignore[attr-defined]
                        break
                    await asyncio.sleep(0.02)
                assert number < 400
                (answer,) = parse(await reader.read(), [b"GET"], ended=True)
                assert answer.status == 408

    run(loop, main)


@both_transports
def test_no_deadline_of_a_request_touches_a_running_response(
    loop: str, tls: bool, certificates: Certificates
) -> None:
    """Row 12: neither before its head nor within it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await asyncio.sleep(0.4)
            await send(START)
            await send({"type": "http.response.body", "body": b"begun", "more_body": True})
            await asyncio.sleep(0.4)
            await send(END)
        else:
            await hello(scope, receive, send)

    names = ("first_byte_timeout", "header_timeout", "keep_alive_timeout", "body_timeout", "linger_timeout")

    async def main() -> None:
        flat = {**dict.fromkeys(names, 0.1), "tls_handshake_timeout": 0.3, **over(certificates, tls)}
        async with serving(app, **flat) as worker:
            async with stream(worker, certificates if tls else None) as (reader, writer):
                writer.write(GET)
                (answer,) = parse(await reader.read(), [b"GET"], ended=True)
                assert (answer.body, answer.complete) == (b"begunend", True)

    run(loop, main)


# Row 13: a limit for a request


def test_a_thread_keeps_its_slot_beyond_the_limit(loop: str) -> None:
    """Row 13: the client gets its 504 in time; the slot is free when the thread has ended, and not before."""
    go_on = threading.Event()

    async def endpoint(request: Request) -> PlainTextResponse:
        await anyio.to_thread.run_sync(go_on.wait)
        return PlainTextResponse("late")

    quick_route = Route("/quick", lambda request: PlainTextResponse("quick"))
    app = Starlette(routes=[Route("/", endpoint), quick_route])

    async def main() -> None:
        async with serving(app, request_timeout=0.1, max_concurrent_requests=1) as worker:
            async with await Client.open(worker) as client:
                await client.send(GET)
                assert (await client.read_one()).status == 504
                quick = CLOSING_GET.replace(b"GET /", b"GET /quick")
                assert len(worker.running) == 1
                assert [answer.status for answer in await fetch(worker, quick)] == [503]
                go_on.set()
                await eventually(lambda: not worker.running)
                assert [answer.status for answer in await fetch(worker, quick)] == [200]

    run(loop, main)


# Row 19: contexts


def test_contexts_do_not_leak_whatever_came_before(loop: str) -> None:
    """Row 19: a pair in one write, a body that pauses the reading, a WebSocket behind them on the same
    connection; and what the lifespan has set is seen by all."""
    shared: contextvars.ContextVar[str] = contextvars.ContextVar("shared", default="none")
    trace: contextvars.ContextVar[str] = contextvars.ContextVar("trace", default="none")
    seen: list[tuple[str, str, str]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            shared.set("startup")
            return await hello(scope, receive, send)
        seen.append((scope["type"], shared.get(), trace.get()))
        trace.set(f"of request {len(seen)}")
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await receive()
            seen.append((scope["type"], shared.get(), trace.get()))
            return None
        await asyncio.sleep(0.02)  # reading is paused meanwhile
        while (await receive()).get("more_body"):
            trace.set("of a piece")
        return await hello(scope, receive, send)

    async def main() -> None:
        big = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 300000\r\n\r\n" + b"x" * 300_000
        async with serving(app) as worker, await Client.open(worker) as client:
            await client.send(GET + GET + big + SHAKE + frame(TEXT, b"x") + close(1000))
            while await client.read():
                pass
            assert client.received.count(b"HTTP/1.1 200") == 3
            assert client.received.count(b"HTTP/1.1 101") == 1

    run(loop, main)
    clean = ("startup", "none")
    assert seen == [*[("http", *clean)] * 3, ("websocket", *clean), ("websocket", "startup", "of request 4")]


# Row 24: compression


@both_transports
def test_what_compression_may_cost_is_a_setting(loop: str, tls: bool, certificates: Certificates) -> None:
    """Row 24: said in the handshake, kept to in both directions, and a bomb is 1009."""
    from websockets.asyncio.client import connect
    from websockets.exceptions import ConnectionClosed
    from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "websocket":
            return await hello(scope, receive, send)
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})
        return None

    async def main() -> None:
        flat = {
            "ws_per_message_deflate": True, "ws_deflate_window_bits": 10, "ws_deflate_mem_level": 2,
            "ws_deflate_context_takeover": False, "ws_max_size": 100_000, **over(certificates, tls),
        }  # fmt: skip
        async with serving(app, **flat) as worker:
            host, port = worker.addresses[0]
            offer = ClientPerMessageDeflateFactory(client_max_window_bits=True)
            async with connect(
                f"{'wss' if tls else 'ws'}://localhost:{port}", host=host, extensions=[offer],
                compression=None, ssl=certificates.client_context() if tls else None,
            ) as client:  # fmt: skip
                assert client.response is not None
                said = client.response.headers["sec-websocket-extensions"]
                assert set(said.split("; ")) == {
                    "permessage-deflate", "client_no_context_takeover", "server_no_context_takeover",
                    "client_max_window_bits=10", "server_max_window_bits=10",
                }  # fmt: skip
                for text in ("Hello" * 1000, "", "grüße" * 9000):
                    await client.send(text)
                    assert await client.recv() == text
                await client.send("x" * 100_001)
                with pytest.raises(ConnectionClosed):
                    await client.recv()
                assert client.close_code == 1009

    run(loop, main)


# Row 27: pings


class _Answering(threading.Thread):
    """A peer in a thread of its own, that answers each ping at once, however busy the server is."""

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(daemon=True)
        self.sock = socket.create_connection(address, 10)
        self.sock.sendall(SHAKE)
        self.frames: list[int] = []

    def run(self) -> None:
        data = b""
        with contextlib.suppress(OSError), self.sock:
            while b"\r\n\r\n" not in data:
                data += self.sock.recv(1000)
            data = data.partition(b"\r\n\r\n")[2]
            while True:
                while len(data) >= 2 and len(data) >= 2 + data[1]:
                    self.frames.append(data[0] & 15)
                    if data[0] & 15 == PING:
                        self.sock.sendall(frame(10, data[2 : 2 + data[1]]))
                    data = data[2 + data[1] :]
                if not (more := self.sock.recv(1000)):
                    return
                data += more


async def _sits(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "websocket":
        return await hello(scope, receive, send)
    await receive()
    await send({"type": "websocket.accept"})
    while (await receive())["type"] == "websocket.receive":
        pass
    return None


def test_a_stalled_loop_is_no_silence_of_the_peer(loop: str) -> None:
    """Row 27: however often the loop stands still for longer than interval and timeout together."""

    async def main() -> None:
        async with serving(_sits, ws_ping_interval=0.1, ws_ping_timeout=0.1) as worker:
            peer = _Answering(worker.addresses[0])
            peer.start()
            await eventually(lambda: peer.frames.count(PING) >= 2)
            for pause in (0.0, 0.09, 0.11):
                time.sleep(0.5)
                await asyncio.sleep(pause)
                time.sleep(1.1)
                await asyncio.sleep(pause)
            before = peer.frames.count(PING)
            await eventually(lambda: peer.frames.count(PING) > before + 2)
            assert CLOSE not in peer.frames
            peer.sock.shutdown(socket.SHUT_RDWR)
            await asyncio.to_thread(peer.join, 5)

    run(loop, main)


def test_a_silent_peer_is_told_of_once(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    """Row 27: 1011, and one line at INFO."""

    async def main() -> None:
        async with serving(_sits, ws_ping_interval=0.1, ws_ping_timeout=0.1) as worker:
            async with await Client.open(worker) as client:
                await client.send(SHAKE)
                while await client.read():
                    pass
                *_, last = parse_frames(bytes(client.received).partition(b"\r\n\r\n")[2])
                assert last[0] == CLOSE
                assert struct.unpack("!H", last[2][:2]) == (1011,)

    with caplog.at_level(logging.INFO, "leanserve"):
        run(loop, main)
    lines = [it for it in caplog.records if "1011" in it.getMessage()]
    assert [it.levelno for it in lines] == [logging.INFO]


# Row 28: who closes a WebSocket, and when

_VANISH = "reset"
_ENDS: dict[str, tuple[str, bytes | str, int, str, int | None]] = {
    # path, what the client does, code and reason that the application is told, code that the client is told
    "client closes": ("waits", close(4001, b"bye"), 4001, "bye", 4001),
    "client closes without a code": ("waits", close(), 1005, "", 1005),
    "client closes behind a message": ("waits", frame(TEXT, b"x") + close(1000), 1000, "", 1000),
    "client closes while it sends": ("floods", close(1001), 1001, "", 1001),
    "client vanishes": ("waits", _VANISH, 1006, "", None),
    "client vanishes while it sends": ("floods", _VANISH, 1006, "", None),
    "client half-closes": ("waits", "fin", 1006, "", None),
    "client breaks the protocol": ("waits", frame(TEXT, b"x", mask=None), 1002, "", 1002),
    "client sends no text": ("waits", frame(TEXT, b"\xff"), 1007, "", 1007),
    "client sends too much": ("waits", frame(BINARY, bytes(101)), 1009, "", 1009),
    "application closes": ("closes", b"", 3333, "enough", 3333),
    "application returns": ("returns", b"", 1000, "", 1000),
    "application crashes": ("crashes", b"", 1011, "", 1011),
    "server stops": ("waits", "drain", 1012, "", 1012),
    "server stops while it sends": ("floods", "drain", 1012, "", 1012),
}


class _Talk:
    """An application that does what `path` says, then asks for the end twice and goes on after it."""

    def __init__(self, path: str, code: int, reason: str) -> None:
        self.path, self.code, self.reason = path, code, reason
        self.disconnects: list[tuple[int, str]] = []
        self.errors: list[BaseException] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "websocket":
            return await hello(scope, receive, send)
        await receive()
        await send({"type": "websocket.accept"})
        if self.path == "crashes":
            raise ValueError("as told")
        if self.path == "returns":
            return None
        if self.path == "closes":
            await send({"type": "websocket.close", "code": self.code, "reason": self.reason})
        if self.path == "floods":
            await self.floods(send)
        while len(self.disconnects) < 2:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                self.disconnects.append((message["code"], message["reason"]))
        for late in ("send", "accept"):
            try:
                await send({"type": f"websocket.{late}", "text": "late"})
            except OSError as error:
                self.errors.append(error)
        await send({"type": "websocket.close"})
        return await send({"type": "websocket.close"})

    async def floods(self, send: Any) -> None:
        try:
            while True:
                await send({"type": "websocket.send", "bytes": b"x"})
                await asyncio.sleep(0)
        except OSError as error:
            self.errors.append(error)


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with socket.fromfd(sock.fileno(), sock.family, sock.type) as copy:
        copy.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@both_transports
@pytest.mark.parametrize("name", _ENDS)
def test_who_closes_and_when(loop: str, name: str, tls: bool, certificates: Certificates) -> None:
    """Row 28: one disconnect with code and reason, every time that it is asked for; what is sent behind it is
    an OSError; a second close is nothing; and the client is told one code."""
    path, act, code, reason, told = _ENDS[name]
    app = _Talk(path, code, reason)

    async def main() -> None:
        flat = {"ws_max_size": 100, "drain_timeout": 0.1, "ws_close_timeout": 0.1, **over(certificates, tls)}
        async with (
            serving(app, **flat) as worker,
            stream(worker, certificates if tls else None) as (reader, writer),
        ):
            writer.write(SHAKE)
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(0.02)
            draining = asyncio.ensure_future(worker.drain()) if act == "drain" else None
            if act == _VANISH:
                _reset(writer)
            elif act == "fin":
                writer.close() if tls else writer.write_eof()
            elif isinstance(act, bytes):
                writer.write(act)
            if told is not None:
                sent = list(parse_frames(await reader.read()))
                closes = [payload for opcode, _, payload in sent if opcode == CLOSE]
                assert [int.from_bytes(it[:2], "big") or 1005 for it in closes] == [told]
                assert sent[-1][0] == CLOSE
            await eventually(lambda: not worker.running)
            if draining is not None:
                await draining

    run(loop, main)
    if path not in ("crashes", "returns"):
        assert [it[0] for it in app.disconnects] == [code] * 2
        assert app.disconnects[0] == app.disconnects[1]
        if reason or code < 1002:
            assert app.disconnects[0][1] == reason
        assert len(app.errors) >= 2
        assert {type(error) for error in app.errors} == {ClientDisconnected}


# Rows 34 and 55: what the scopes of one connection have


@both_transports
def test_the_tls_of_a_connection_is_in_every_scope(loop: str, tls: bool, certificates: Certificates) -> None:
    """Row 34: of requests and of a WebSocket, made once for the connection; without TLS there is none.
    Row 55: each has its own shallow copy of the state."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            scope["state"]["model"] = []
            await hello(scope, receive, send)
            return
        seen.append(scope["extensions"].get("tls"))
        assert list(scope["state"]) == ["model"]
        scope["state"]["own"] = 1
        scope["state"]["model"].append(scope["type"])
        if scope["type"] == "http":
            await hello(scope, receive, send)
        else:
            await send({"type": "websocket.accept"})

    async def main() -> None:
        async with (
            serving(app, **over(certificates, tls)) as worker,
            stream(worker, certificates if tls else None) as (reader, writer),
        ):
            for _ in range(2):
                writer.write(GET)
                await reader.readuntil(b"hello")
            writer.write(SHAKE)
            assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
            assert worker.state == {"model": ["http", "http", "websocket"]}

    run(loop, main)
    if tls:
        assert {type(each) for each in seen} == {dict}
        assert len({id(each["server_cert"]) for each in seen}) == 1
    else:
        assert seen == [None] * 3


# Row 31: send() to a client that has gone


@pytest.mark.parametrize("leave", ["reset", "close"])
def test_a_generator_is_closed_when_its_client_has_gone(loop: str, leave: str) -> None:
    """Row 31: a StreamingResponse, cancelled or told, makes no more than one further piece."""
    made = 0
    at_the_end: list[int] = []
    gone_at = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal made
        try:
            while True:
                made += 1
                yield b"piece"
                await asyncio.sleep(0.02)
        finally:
            at_the_end.append(made)

    app = Starlette(routes=[Route("/", lambda request: StreamingResponse(pieces()))])

    async def main() -> None:
        nonlocal gone_at
        for cancels in (True, False):
            at_the_end.clear()
            async with serving(app, cancel_on_disconnect=cancels) as worker:
                client = await Client.open(worker)
                await client.send(GET)
                while b"piece" not in client.received:
                    await client.read()
                (connection,) = worker.connections
                client.reset() if leave == "reset" else client.sock.close()
                await eventually(lambda it=connection: it.gate.lost)
                gone_at = made
                await eventually(lambda: at_the_end and not worker.running)
                assert at_the_end[0] - gone_at <= 1

    run(loop, main)


def test_starlette_says_it_in_its_own_words(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    """Row 31: a stream, a body that breaks off, and a WebSocket: a line for debugging, no traceback."""
    pieces_left: list[str] = []

    async def streams(request: Request) -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            while True:
                yield b"piece"
                await asyncio.sleep(0.01)

        return StreamingResponse(pieces())

    async def reads(request: Request) -> PlainTextResponse:
        return PlainTextResponse(await request.body())

    async def talks(websocket: WebSocket) -> None:
        await websocket.accept()
        while websocket.url.path == "/talks":
            await websocket.send_text("x")
            await asyncio.sleep(0.01)
        pieces_left.append(await websocket.receive_text())

    app = Starlette(
        routes=[
            Route("/streams", streams), Route("/reads", reads, methods=["POST"]),
            WebSocketRoute("/talks", talks), WebSocketRoute("/listens", talks),
        ]
    )  # fmt: skip
    body = b"POST /reads HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nhalf"
    starts = [GET.replace(b"/", b"/streams", 1), body]
    starts += [SHAKE.replace(b"/", path, 1) for path in (b"/talks", b"/listens")]

    async def main() -> None:
        async with serving(app, cancel_on_disconnect=False) as worker:
            for start in starts:
                client = await Client.open(worker)
                await client.send(start)
                await eventually(lambda: worker.running)
                if start is not body:
                    await client.read()
                client.reset()
                await eventually(lambda: not worker.running)

    with caplog.at_level(logging.DEBUG, "leanserve"):
        run(loop, main)
    told = [it for it in caplog.records if "left" in it.getMessage()]
    assert [(it.levelno, it.exc_info) for it in told] == [(logging.DEBUG, None)] * 4
    assert not [it for it in caplog.records if it.exc_info]
    assert pieces_left == []


@pytest.mark.parametrize("kind", ["bare", "group", "group in a group"])
def test_a_client_that_has_gone_is_no_traceback(
    loop: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Row 31: one line for debugging; spec_version says that send() raises an OSError."""
    versions: list[str] = []

    async def sends(send: Any) -> None:
        await send(START)
        while True:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await asyncio.sleep(0.01)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await hello(scope, receive, send)
        versions.append(scope["asgi"]["spec_version"])
        if kind == "bare":
            return await sends(send)
        async with asyncio.TaskGroup() as outer:
            if kind == "group":
                outer.create_task(sends(send))
            else:
                async with asyncio.TaskGroup() as inner:
                    inner.create_task(sends(send))
        return None

    async def main() -> None:
        async with serving(app, cancel_on_disconnect=False) as worker:
            client = await Client.open(worker)
            await client.send(GET)
            await client.read()
            client.reset()
            await eventually(lambda: not worker.running)

    with caplog.at_level(logging.DEBUG, "leanserve"):
        run(loop, main)
    assert [tuple(map(int, it.split("."))) >= (2, 4) for it in versions] == [True]
    told = [it for it in caplog.records if "left" in it.getMessage()]
    assert [(it.levelno, it.exc_info) for it in told] == [(logging.DEBUG, None)]
    assert not [it for it in caplog.records if it.exc_info]


# Rows 44 and 45: what is on the wire


@both_transports
def test_behind_close_nothing_is_read(
    loop: str, tls: bool, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    """Row 44: a request behind the last one, rubbish, half a head: dropped without a word in the log."""
    called: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            called.append(scope["path"])
            await asyncio.sleep(0.02)
        await hello(scope, receive, send)

    async def main() -> None:
        async with serving(app, linger_timeout=0.2, **over(certificates, tls)) as worker:
            for behind in (GET, b"\x00\xff rubbish", GET[:9], b"x" * 100_000):
                called.clear()
                async with stream(worker, certificates if tls else None) as (reader, writer):
                    writer.write(CLOSING_GET + behind)
                    await reader.read(1)
                    with contextlib.suppress(OSError):
                        writer.write(behind)
                        rest = await reader.read()
                    (answer,) = parse(b"H" + rest, [b"GET"], ended=True)
                    assert (answer.status, answer.closes) == (200, True)
                    assert called == ["/"]

    with caplog.at_level(logging.INFO, "leanserve"):
        run(loop, main)
    assert [it.getMessage() for it in caplog.records if "refused" in it.getMessage() or it.exc_info] == []


@both_transports
def test_a_drain_answers_what_was_sent_behind(loop: str, tls: bool, certificates: Certificates) -> None:
    """Row 44: in order, and the last says close."""
    go_on = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            if scope["path"] == "/0":
                await send(START)  # its head is held: the drain is still in time for it
                await send({"type": "http.response.body", "body": b"", "more_body": True})
                await go_on.wait()
                await send({"type": "http.response.body", "body": scope["path"].encode()})
            else:
                await send(START)
                await send({"type": "http.response.body", "body": scope["path"].encode()})
        else:
            await hello(scope, receive, send)

    async def main() -> None:
        async with serving(app, **over(certificates, tls)) as worker:
            async with stream(worker, certificates if tls else None) as (reader, writer):
                writer.write(b"".join(b"GET /%d HTTP/1.1\r\nhost: a\r\n\r\n" % number for number in range(2)))
                await eventually(lambda: worker.running)
                await asyncio.sleep(0.05)
                draining = asyncio.ensure_future(worker.drain())
                await asyncio.sleep(0.05)
                go_on.set()
                answers = parse(await reader.read(), [b"GET"] * 9, ended=True)
                assert [answer.body for answer in answers] == [b"/0", b"/1"]
                assert [answer.closes for answer in answers] == [False, True]
                await draining

    run(loop, main)


_BODILESS: dict[str, tuple[bytes, int, bytes | None, list[bytes], bytes | None, str]] = {
    # method, status, content-length and pieces of the application; content-length on the wire, and the log
    "204 with a body": (b"GET", 204, None, [b"abc"], None, "has no body"),
    "204 with a body in pieces": (b"GET", 204, None, [b"a", b"bc"], None, "has no body"),
    "204 with a length": (b"GET", 204, b"3", [b"abc"], None, "has no body"),
    "304 keeps its length": (b"GET", 304, b"3", [b""], b"3", ""),
    "HEAD keeps its length": (b"HEAD", 200, b"3", [b"abc"], b"3", ""),
    "205 is empty": (b"GET", 205, None, [b"abc"], b"0", "has no body"),
}


@both_transports
@pytest.mark.parametrize("name", _BODILESS)
def test_answers_without_a_body(
    loop: str, name: str, tls: bool, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    """Row 45: framing as the method and the status ask for, one warning for what is dropped, and the
    connection goes on with the next answer."""
    method, status, length, pieces, expected, says = _BODILESS[name]
    headers = [] if length is None else [(b"content-length", length)]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] == "/next":
            return await hello(scope, receive, send)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": piece is not pieces[-1]})
        return None

    async def main() -> None:
        async with serving(app, **over(certificates, tls)) as worker:
            async with stream(worker, certificates if tls else None) as (reader, writer):
                writer.write(GET.replace(b"GET", method) + CLOSING_GET.replace(b"/", b"/next", 1))
                first, second = parse(await reader.read(), [method, b"GET"], ended=True)
                assert (first.status, first.get(b"transfer-encoding")) == (status, None)
                assert first.get(b"content-length") == expected
                assert second.body == b"hello"

    with caplog.at_level(logging.WARNING, "leanserve"):
        run(loop, main)
    lines = [it.getMessage() for it in caplog.records]
    assert len(lines) == bool(says)
    assert all(says in line for line in lines)


@both_transports
@pytest.mark.parametrize("pieces", [[b"abcd"], [b"ab", b"cd"], [b"ab"], [b"a", b"b"], []])
def test_a_length_that_is_not_the_bodys(
    loop: str, tls: bool, pieces: list[bytes], certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    """Row 45: cut at the length that was said, or closed without the end; an error in the log; never a second
    answer."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await hello(scope, receive, send)
        await send({**START, "headers": [(b"content-length", b"3")]})
        for piece in pieces or [b""]:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return None

    async def main() -> None:
        async with serving(app, linger_timeout=0.1, **over(certificates, tls)) as worker:
            async with stream(worker, certificates if tls else None) as (reader, writer):
                writer.write(GET + GET)
                (answer,) = parse(await reader.read(), [b"GET"] * 2, ended=True)
                assert answer.body == b"".join(pieces)[:3]
                assert answer.complete == (len(b"".join(pieces)) > 3)

    with caplog.at_level(logging.ERROR, "leanserve"):
        run(loop, main)
    assert len(caplog.records) == 1
    assert "content-length" in caplog.text


# Row 47: limits of a head


@pytest.mark.parametrize(
    ("name", "allowed", "data", "status"),
    [
        ("request_line_bytes", 100, b"GET /" + b"x" * 87 + b" HTTP/1.1\r\nhost: a\r\n\r\n", 414),
        ("header_bytes", 300, b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"x" * 289 + b"\r\n\r\n", 431),
        ("header_count", 3, b"GET / HTTP/1.1\r\nhost: a\r\na: \r\nb: \r\nc: \r\n\r\n", 431),
        (
            "trailer_bytes", 30,
            b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
            b"0\r\nx: " + b"x" * 26 + b"\r\n\r\n", 431,
        ),
    ],
)  # fmt: skip
def test_one_line_for_what_is_too_large(
    loop: str, name: str, allowed: int, data: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Row 47: exact, though it comes in one read; the line has the peer, the limit and its value, and there
    are not more than ten a second of them."""

    async def reads(scope: Any, receive: Any, send: Any) -> None:
        while scope["type"] == "http" and (await receive()).get("more_body"):
            pass
        await hello(scope, receive, send)

    async def main() -> None:
        async with serving(reads, **{name: allowed}, linger_timeout=0.1) as worker:
            async with await Client.open(worker) as client:
                peer = "{}:{}".format(*client.sock.getsockname())
                await client.send(data)
                assert [answer.status for answer in await client.read_all(data.split()[0])] == [status]
            (line,) = [it.getMessage() for it in caplog.records if it.levelno == logging.INFO]
            for word in (peer, name, str(allowed)):
                assert word in line
        async with serving(reads, **{name: allowed + 1}, linger_timeout=0.1) as worker:
            async with await Client.open(worker) as client:
                await client.send(data)
                assert (await client.read_one(data.split()[0])).status == 200
        caplog.clear()
        async with serving(reads, **{name: allowed}, linger_timeout=0.0) as worker:
            began = time.monotonic()
            for _ in range(60):
                await fetch(worker, data)
            assert len(caplog.records) <= 12 * (int(time.monotonic() - began) + 2)
            assert len(caplog.records) < 60

    with caplog.at_level(logging.INFO, "leanserve"):
        run(loop, main)
    assert not [it for it in caplog.records if it.exc_info]


# Row 59: targets


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"GET http://b.example/p?q HTTP/1.1", ("/p", b"b.example")),
        (b"GET HTTP://b.example:81 HTTP/1.1", ("/", b"b.example:81")),
        (b"OPTIONS * HTTP/1.1", ("*", b"a")),
        (b"GET * HTTP/1.1", 400),
        (b"GET path HTTP/1.1", 400),
        (b"GET @b.example HTTP/1.1", 400),
        (b"GET /a#b HTTP/1.1", 400),
        (b"GET ftp://b/ HTTP/1.1", 400),
        (b"CONNECT b:443 HTTP/1.1", 501),
        (b"CONNECT /a HTTP/1.1", 501),
    ],
)
@both_transports
def test_targets(loop: str, tls: bool, line: bytes, expected: Any, certificates: Certificates) -> None:
    """Row 59: origin-form, absolute-form (its authority is the Host), the star of OPTIONS; else refused."""
    seen: list[tuple[str, bytes]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            seen.append((scope["path"], dict(scope["headers"])[b"host"]))
        await hello(scope, receive, send)

    async def main() -> None:
        async with serving(app, linger_timeout=0.1, **over(certificates, tls)) as worker:
            async with stream(worker, certificates if tls else None) as (reader, writer):
                writer.write(line + b"\r\nhost: a\r\nconnection: close\r\n\r\n" + GET)
                (answer,) = parse(await reader.read(), [line.split()[0]], ended=True)
                if isinstance(expected, int):
                    assert (answer.status, seen) == (expected, [])
                else:
                    assert seen == [expected]

    run(loop, main)
