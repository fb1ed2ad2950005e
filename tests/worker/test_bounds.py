"""What one peer can have of a worker: turns of bounded work, and bodies of bounded size, on real sockets."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from served import GET, Client, eventually, fetch, run, serving
from ws_frames import BINARY, CONT, PING, TEXT, frame

HANDSHAKE = (
    b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\nsec-websocket-version: 13\r\n\r\n"
)
POST = b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Counting:
    """An application that takes all it can get, and counts."""

    def __init__(self) -> None:
        self.count = 0
        self.ended = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            raise RuntimeError("no lifespan")
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            while (await receive())["type"] == "websocket.receive":
                self.count += 1
            self.ended = True
            return
        more = True
        while more:
            message = await receive()
            more = message.get("more_body", False)
        self.count += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % self.count})


async def most_per_turn(measure: Callable[[], int], until: Callable[[], bool]) -> int:
    """By how much a measure grows in one turn of the event loop, at most, until the condition holds."""
    seen = [measure()]
    async with asyncio.timeout(30):
        while not until():
            await asyncio.sleep(0)
            seen.append(measure())
    return max(after - before for before, after in itertools.pairwise(seen))


def received_bytes(worker: Any) -> Callable[[], int]:
    """Of the request body that is under way."""
    return lambda: sum(exchange.received_bytes for exchange in worker.running)


def test_small_chunks(loop: str) -> None:
    async def main() -> None:
        app = Counting()
        async with serving(app) as worker, await Client.open(worker) as client:
            await client.send(CHUNKED)
            await eventually(lambda: worker.running)
            sending = asyncio.ensure_future(client.send(b"1\r\na\r\n" * 20_000))
            measure = received_bytes(worker)
            # A read and a turn that was due may fall into the same turn of the loop.
            assert await most_per_turn(measure, lambda: measure() == 20_000) <= 300
            await sending
            await client.send(b"0\r\n\r\n")
            (response,) = await client.read_all(b"POST")
            assert response.body == b"1"

    run(loop, main)


def test_small_messages(loop: str) -> None:
    """Of an application that only receives, and so never gives way by itself."""

    async def main() -> None:
        app = Counting()
        async with serving(app) as worker, await Client.open(worker) as client:
            await client.send(HANDSHAKE)
            await client.read()
            sending = asyncio.ensure_future(client.send(frame(TEXT, b"a") * 10_000))
            assert await most_per_turn(lambda: app.count, lambda: app.count == 10_000) <= 600
            await sending

    run(loop, main)


@pytest.mark.parametrize("concurrency", [None, 5])
def test_pipelined_requests_take_a_turn_each(loop: str, concurrency: int | None) -> None:
    async def main() -> None:
        app = Counting()
        async with serving(app, limit_concurrency=concurrency) as worker:
            async with await Client.open(worker) as client:
                sending = asyncio.ensure_future(client.send(GET * 500))
                assert await most_per_turn(lambda: app.count, lambda: app.count == 500) <= 2
                await sending

    run(loop, main)


def test_pings_of_who_does_not_read(loop: str) -> None:
    """Their answers are bounded by the water mark, however many come."""

    async def main() -> None:
        app = Counting()
        async with serving(app, send_high_water=4096, ws_ping_interval=0) as worker:
            async with await Client.open(worker, receive_buffer=4096) as client:
                await client.send(HANDSHAKE)
                await client.read()
                for _ in range(30):
                    await client.send(frame(PING, b"x" * 125) * 1000)
                await client.send(frame(BINARY, b"end"))
                await eventually(lambda: app.count == 1, 20)
                (connection,) = worker.connections
                assert connection.transport.get_write_buffer_size() <= 4096 + 16 * 127

    run(loop, main)


def test_fragments_of_one_byte(loop: str) -> None:
    async def main() -> None:
        app = Counting()
        async with serving(app, ws_max_fragments=1000) as worker, await Client.open(worker) as client:
            await client.send(HANDSHAKE)
            await client.read()
            # One more for each 64 bytes.
            await client.send(frame(TEXT, b"a", fin=False) + frame(CONT, b"b", fin=False) * 1014)
            await asyncio.sleep(0.05)
            assert not app.ended
            await client.send(frame(CONT, b"b", fin=False))
            await eventually(lambda: app.ended)
            assert b"\x03\xf1" in await client.read()  # Close 1009
            assert app.count == 0

    run(loop, main)


@pytest.mark.parametrize("fastpath", [True, False])
def test_the_size_of_a_body(loop: str, fastpath: bool) -> None:
    async def main() -> None:
        app = Counting()
        async with serving(app, max_body_size=10, fastpath=fastpath) as worker:
            for body in (
                b"content-length: 10\r\n\r\n0123456789",
                b"transfer-encoding: chunked\r\n\r\na\r\n0123456789\r\n0\r\n\r\n",
            ):
                (response,) = await fetch(worker, POST + body)
                assert response.status == 200
            assert app.count == 2
            # Announced: before it is sent, before it is asked for, and before the application is called.
            (response,) = await fetch(worker, POST + b"expect: 100-continue\r\ncontent-length: 11\r\n\r\n")
            assert (response.interim, response.status) == ([], 413)
            (response,) = await fetch(worker, CHUNKED + b"a\r\n0123456789\r\n1\r\n")
            assert response.status == 413
            assert app.count == 3  # which has been told http.disconnect
            # What comes all the same is read and dropped, so that the answer arrives.
            (response,) = await fetch(worker, POST + b"content-length: 1000000\r\n\r\n" + b"x" * 1_000_000)
            assert response.status == 413

    run(loop, main)
