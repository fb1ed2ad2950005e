"""WebSocket over real sockets, with clients that others wrote, and with some that nobody should write."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
import uvloop
import websockets
from fastapi import FastAPI, WebSocket

from leanserve import Server
from ws_frames import BINARY, CLOSE, CONT, PING, TEXT, close, frame, parse

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
Main = Callable[[], Coroutine[Any, Any, None]]


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[[Main], None]:
    """Run a coroutine function on one of the loops, within 30 s."""

    async def bounded(main: Main) -> None:
        async with asyncio.timeout(30):
            await main()

    def runner(main: Main) -> None:
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as made:
            made.run(bounded(main))

    return runner


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Echoes; /reject refuses, /deny denies, /close/CODE closes, /crash crashes, /flood sends for ever."""
    assert scope["type"] == "websocket"
    await receive()
    path = scope["path"]
    if path == "/reject":
        return
    if path == "/deny":
        await send({"type": "websocket.http.response.start", "status": 401, "headers": [(b"x-why", b"no")]})
        await send({"type": "websocket.http.response.body", "body": b"go away"})
        return
    offered = scope["subprotocols"]
    await send({"type": "websocket.accept", "subprotocol": offered[-1] if offered else None})
    if path.startswith("/close/"):
        await send({"type": "websocket.close", "code": int(path[7:]), "reason": "grüße"})
        return
    if path == "/crash":
        raise ValueError("boom")
    while path == "/flood":
        await send({"type": "websocket.send", "bytes": bytes(65536)})
        sent.append(65536)
    while (message := await receive())["type"] == "websocket.receive":
        await send({**message, "type": "websocket.send"})
    ends.append((message["code"], message["reason"]))


sent: list[int] = []
ends: list[tuple[int, str]] = []


@pytest.fixture(autouse=True)
def _forget() -> None:
    sent.clear()
    ends.clear()


@asynccontextmanager
async def serving(app: Any = echo, **settings: Any) -> AsyncIterator[str]:
    settings = {"port": 0, "lifespan": "off", "access_log": False, "drain_timeout": 1.0} | settings
    async with Server(app, **settings).running() as server:
        yield server.urls[0].replace("http", "ws", 1)


@asynccontextmanager
async def raw(url: str, *lines: bytes, behind: bytes = b"") -> AsyncIterator[Any]:
    """(reader, writer, head of the answer) of a handshake made by hand."""
    host, port = url.removeprefix("ws://").rstrip("/").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        head = b"GET / HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
        key = b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n"
        writer.write(head + key + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + behind)
        yield reader, writer, await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("compression", ["deflate", None])
def test_echo_with_websockets(run: Any, compression: Any) -> None:
    async def main() -> None:
        async with serving(ws_per_message_deflate=True) as url:
            async with websockets.connect(url, compression=compression, max_size=None) as client:
                assert bool(client.protocol.extensions) is (compression is not None)
                big = bytes(range(256)) * 20_000
                for message in ("", "x", "grüße 🌍" * 50_000, b"", b"\0", big):
                    await client.send(message)
                    assert await client.recv() == message
                await client.send(["frag", "men", "ted"])
                assert await client.recv() == "fragmented"
                assert await (await client.ping(b"42")) >= 0
                await client.close(4001, "bye ü")
            await asyncio.sleep(0)
        assert ends == [(4001, "bye ü")]

    run(main)


def test_echo_with_aiohttp_over_tls(run: Any, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "pem"))
    context = ssl.create_default_context()
    authority.configure_trust(context)

    async def main() -> None:
        async with serving(ssl_certfile=str(tmp_path / "pem"), ws_per_message_deflate=True) as url:
            assert url.startswith("wss://")
            async with aiohttp.ClientSession() as session:
                async with session.ws_connect(url, ssl=context, compress=15, max_msg_size=0) as client:
                    for size in (0, 1, 70_000, 3_000_000):
                        await client.send_bytes(bytes(size))
                        assert await client.receive_bytes() == bytes(size)
                        await client.send_str("x" * size)
                        assert await client.receive_str() == "x" * size

    run(main)


def test_a_fastapi_application(run: Any) -> None:
    app = FastAPI()

    @app.websocket("/items/{name}")
    async def items(socket: WebSocket, name: str) -> None:
        await socket.accept()
        async for text in socket.iter_text():
            await socket.send_json({"name": name, "text": text, "q": socket.query_params.get("q")})

    async def main() -> None:
        async with serving(app) as url:
            async with websockets.connect(f"{url}/items/a%20b?q=1") as client:
                await client.send("x")
                assert await client.recv() == '{"name":"a b","text":"x","q":"1"}'
            with pytest.raises(websockets.InvalidStatus) as caught:
                async with websockets.connect(f"{url}/nowhere"):
                    pass
            assert caught.value.response.status_code == 403

    run(main)


def test_answers_to_the_handshake(run: Any) -> None:
    async def main() -> None:
        async with serving() as url:
            async with websockets.connect(url, subprotocols=["a", "b"]) as client:  # type: ignore[list-item]
                assert client.subprotocol == "b"
            for path, status in (("/reject", 500), ("/deny", 401)):
                with pytest.raises(websockets.InvalidStatus) as caught:
                    async with websockets.connect(url + path):
                        pass
                response = caught.value.response
                assert response.status_code == status
                assert len(response.headers.get_all("content-length")) == 1
                if status == 401:
                    assert (bytes(response.body or b""), response.headers["x-why"]) == (b"go away", "no")

    run(main)


@pytest.mark.parametrize(("path", "code"), [("/close/1000", 1000), ("/close/4999", 4999), ("/crash", 1011)])
def test_codes_of_the_server(run: Any, path: str, code: int) -> None:
    async def main() -> None:
        async with serving() as url:
            async with websockets.connect(url + path) as client:
                with pytest.raises(websockets.ConnectionClosed):
                    await client.recv()
                assert client.close_code == code
                assert client.close_reason == ("" if path == "/crash" else "grüße")

    run(main)


def test_a_server_that_stops_says_1012(run: Any) -> None:
    async def main() -> None:
        async with serving(drain_timeout=0.2) as url:
            client = await websockets.connect(url)
        with pytest.raises(websockets.ConnectionClosed):
            await client.recv()
        assert client.close_code == 1012
        assert ends == [(1012, "")]

    run(main)


def test_a_client_that_vanishes_is_1006(run: Any) -> None:
    async def main() -> None:
        async with serving() as url:
            async with raw(url) as (_, writer, _head):
                writer.write(frame(TEXT, b"x"))
                await writer.drain()
            while not ends:
                await asyncio.sleep(0.01)
        assert ends == [(1006, "")]

    run(main)


def test_frames_that_come_with_the_handshake(run: Any) -> None:
    async def main() -> None:
        async with serving() as url:
            for _ in range(20):
                behind = frame(TEXT, b"1") + frame(TEXT, b"2")[:3]
                async with raw(url, behind=behind) as (reader, writer, _head):
                    writer.write(frame(TEXT, b"2")[3:] + frame(TEXT, b"3"))
                    assert await reader.readexactly(9) == b"\x81\x011\x81\x012\x81\x013"

    run(main)


def test_hostile_handshakes_harm_nobody(run: Any) -> None:
    lines = [
        b"sec-websocket-protocol: \x80\xff",
        b"sec-websocket-extensions: \x80\xff",
        b"content-length: 5",
        b"sec-websocket-key: x",
    ]
    offers = [b'server_max_window_bits="15"', b"server_max_window_bits=abc", b"server_max_window_bits="]

    async def main() -> None:
        async with serving(ws_per_message_deflate=True) as url, websockets.connect(url) as other:
            for line in lines * 20:
                async with raw(url, line) as (_, _writer, head):
                    assert head.startswith(b"HTTP/1.1 400 ")
            for offer in offers:
                line = b"sec-websocket-extensions: permessage-deflate; " + offer
                async with raw(url, line) as (_, _writer, head):
                    assert head.startswith(b"HTTP/1.1 101 ")
                    assert b"permessage" not in head
            await other.send("alive")
            assert await other.recv() == "alive"
        assert ends[-1] == (1000, "")

    run(main)


@pytest.mark.parametrize(
    ("flood", "code"),
    [
        (frame(BINARY, b"", fin=False) + frame(CONT, b"", fin=False) * 100_000, 1009),
        (frame(BINARY, b"x", fin=False) + frame(CONT, b"x", fin=False) * 100_000, 1009),
        (frame(PING, b"p" * 125) * 20_000 + close(1000), 1000),
        (b"\x82\xff" + struct.pack("!Q", 1 << 30) + b"mask", 1009),
    ],
    ids=["empty fragments", "small fragments", "pings", "declared length"],
)
def test_floods(run: Any, flood: bytes, code: int) -> None:
    """The flood ends with its close code, and another client is answered all the while."""

    async def main() -> None:
        async with serving() as url, websockets.connect(url) as other:
            async with raw(url) as (reader, writer, _head):
                writer.write(flood)
                answer = asyncio.ensure_future(reader.read(-1))
                slowest = 0.0
                while not answer.done():
                    began = time.monotonic()
                    await other.send("x")
                    await other.recv()
                    slowest = max(slowest, time.monotonic() - began)
                frames = list(parse(await answer))
                assert frames[-1] == (CLOSE, 0, struct.pack("!H", code))
                assert len(frames) < 15_000
                assert slowest < 2.0

    run(main)


def test_a_client_that_does_not_read_costs_no_memory(run: Any) -> None:
    async def main() -> None:
        async with serving(drain_timeout=0.1) as url:
            async with websockets.connect(url + "/flood", max_size=None, max_queue=1) as client:
                await client.recv()
                seen = -1
                while seen != len(sent):
                    seen = len(sent)
                    await asyncio.sleep(0.3)
                assert sum(sent) < 64 << 20  # what the kernel's buffers hold; the application waits in send()
                for _ in range(50):
                    await client.recv()
                assert len(sent) > seen
                client.transport.abort()

    run(main)


def test_a_sender_without_end_does_not_hold_the_worker(run: Any) -> None:
    """A client in a thread reads as fast as the application sends, and then resets the connection."""

    def client(url: str) -> None:
        host, port = url.removeprefix("ws://").rstrip("/").split(":")
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(
                b"GET /flood HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
                b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
            )
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                sock.recv(1 << 18)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def main() -> None:
        async with serving() as url, websockets.connect(url) as other:
            reading = asyncio.ensure_future(asyncio.to_thread(client, url))
            slowest = 0.0
            while not reading.done():
                began = time.monotonic()
                await other.send("x")
                await other.recv()
                slowest = max(slowest, time.monotonic() - began)
            assert slowest < 0.4  # half a second is what it takes when the others have to wait for the reset
            seen = -1
            while seen != len(sent):  # the application is told
                seen = len(sent)
                await asyncio.sleep(0.1)

    run(main)


def test_a_silent_client_is_dropped_with_1011(run: Any) -> None:
    async def main() -> None:
        async with serving(ws_ping_interval=0.1, ws_ping_timeout=0.1) as url:
            async with raw(url) as (reader, _writer, _head):
                frames = list(parse(await reader.read(-1)))
                assert (PING, 0, b"") in frames
                assert frames[-1][0] == CLOSE
                assert frames[-1][2].startswith(struct.pack("!H", 1011))
            async with websockets.connect(url, ping_interval=None) as client:
                await asyncio.sleep(1.0)  # it answers pings
                await client.send("alive")
                assert await client.recv() == "alive"

    run(main)
