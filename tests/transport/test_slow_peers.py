"""Peers that send or read too slowly: by the byte with fake time, and on real sockets."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from fakes import FakeService, FakeTransport
from leanserve.errors import ClientDisconnected
from leanserve.settings import Settings
from leanserve.transport.connection import Connection
from served import LOOPS, Client, eventually, run, serving
from wire import parse

POST = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
EXPECT = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\nexpect: 100-continue\r\n\r\n"
START = {"type": "http.response.start", "status": 200, "headers": []}


class Reads:
    """Reads all, or waits first; notes its end."""

    def __init__(self, *, waits: bool = False, begins: bool = False) -> None:
        self.end: Any = None
        self.got = 0
        self.go_on = asyncio.Event()
        self.waits, self.begins = waits, begins

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            if self.begins:
                await send(START)
                await send({"type": "http.response.body", "body": b"begun", "more_body": True})
            if self.waits:
                await self.go_on.wait()
            more = True
            while more:
                message = await receive()
                self.got += len(message["body"])
                more = message["more_body"]
            self.end = "read"
            if not self.begins:
                await send(START)
            await send({"type": "http.response.body", "body": b"end"})
        except asyncio.CancelledError as error:
            self.end = error.args
            raise


class Rig:
    def __init__(self, app: Any, **flat: Any) -> None:
        self.service = FakeService(app, Settings.build(**flat))
        self.connection: Connection
        self.transport: FakeTransport
        self.connection, self.transport = self.service.connect()

    def feed(self, data: bytes) -> None:
        self.transport.feed(data)
        self.service.loop.run()

    def wait(self, seconds: float) -> None:
        self.service.loop.pass_time(seconds)
        self.service.loop.run()

    @property
    def statuses(self) -> list[int]:
        return [answer.status for answer in parse(self.transport.wire, [b"POST"] * 9, ended=True)]

    def close(self) -> None:
        assert not self.service.failures
        self.service.loop.close()


@pytest.mark.parametrize("fastpath", [True, False])
@pytest.mark.parametrize("head", [POST, CHUNKED])
def test_a_body_that_stops(head: bytes, fastpath: bool) -> None:
    app = Reads()
    it = Rig(app, fastpath=fastpath, body_timeout=20, body_min_rate=0)
    it.feed(head)
    it.wait(19)
    it.feed(b"5\r\nhello\r\n")
    it.wait(19)
    assert it.statuses == []
    it.wait(2)
    assert it.statuses == [408]
    assert app.end == ("deadline",)
    assert [(record.status, record.cause) for record in it.service.records] == [(408, "deadline")]
    it.close()


def test_a_byte_a_second_ends_near_the_start_that_it_was_given() -> None:
    """20 seconds, and a hundredth of a second for each byte."""
    it = Rig(Reads(), body_timeout=20, body_min_rate=100)
    it.feed(POST)
    for _ in range(20):
        it.wait(1)
        it.feed(b"x")
        assert it.statuses == []
    it.wait(0.3)
    assert it.statuses == [408]
    it.close()


def test_fast_enough_is_never_too_slow() -> None:
    app = Reads()
    it = Rig(app, body_timeout=20, body_min_rate=100)
    it.feed(POST)
    for _ in range(1000):
        it.wait(10)
        it.feed(b"x" * 1000)
    assert (app.end, app.got) == ("read", 1_000_000)
    assert it.statuses == [200]
    it.close()


def test_a_trickle_may_be_allowed() -> None:
    app = Reads()
    it = Rig(app, body_timeout=20, body_min_rate=0)
    it.feed(POST)
    for _ in range(60):
        it.wait(19)
        it.feed(b"x")
    assert it.statuses == []
    it.wait(21)
    assert it.statuses == [408]
    it.close()


def test_time_in_which_we_do_not_read_is_not_the_peers() -> None:
    app = Reads(waits=True)
    it = Rig(app, body_timeout=20)
    it.feed(POST + b"x" * 100_000)
    assert it.connection.paused
    it.wait(1000)
    assert it.statuses == []
    app.go_on.set()
    it.service.loop.run()
    assert not it.connection.paused
    it.wait(19)
    assert it.statuses == []
    it.wait(2)
    assert it.statuses == [408]
    it.close()


def test_who_waits_for_100_is_not_late() -> None:
    app = Reads(waits=True)
    it = Rig(app, body_timeout=20)
    it.feed(EXPECT)
    it.wait(1000)
    assert it.transport.wire == b""
    app.go_on.set()
    it.service.loop.run()
    assert it.transport.wire.startswith(b"HTTP/1.1 100 ")
    it.wait(19)
    assert it.statuses == []
    it.wait(2)
    assert it.statuses == [408]
    it.close()


def test_a_response_that_has_begun_is_cut() -> None:
    app = Reads(begins=True)
    it = Rig(app, body_timeout=20)
    it.feed(POST)
    it.wait(21)
    (answer,) = parse(it.transport.wire, [b"POST"], ended=True)
    assert (answer.status, answer.complete) == (200, False)
    assert app.end == ("deadline",)
    it.close()


def test_nothing_is_limited_behind_the_end_of_the_body() -> None:
    async def computes(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await asyncio.Event().wait()

    it = Rig(computes, body_timeout=20)
    it.feed(POST.replace(b"1000000", b"4") + b"ab")
    it.feed(b"cd")
    it.wait(10_000)
    assert it.statuses == []
    assert it.service.running
    it.close()


# Readers


class Floods:
    """Sends without end."""

    def __init__(self, size: int = 50_000) -> None:
        self.size = size
        self.sent = 0
        self.end: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            if scope["type"] == "websocket":
                await receive()
                await send({"type": "websocket.accept"})
                while True:
                    await send({"type": "websocket.send", "bytes": bytes(self.size)})
                    self.sent += self.size
            await send(START)
            while True:
                await send({"type": "http.response.body", "body": bytes(self.size), "more_body": True})
                self.sent += self.size
        except asyncio.CancelledError as error:
            self.end = (*error.args, scope["extensions"]["leanserve.cancellation"]["cause"])
            raise
        except ClientDisconnected:
            self.end = "disconnected"


SLOW = ("slow_reader", "slow_reader")


def test_a_reader_that_stops_is_cut() -> None:
    app = Floods()
    it = Rig(app, send_timeout=60)
    it.feed(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    it.wait(59)
    assert app.end is None
    it.wait(2)
    assert app.end == SLOW
    assert it.transport.aborted
    assert [record.cause for record in it.service.records] == ["slow_reader"]
    it.close()


@pytest.mark.parametrize(("rate", "cut"), [(2000, False), (500, True)])
def test_a_slow_reader(rate: int, cut: bool) -> None:
    """One that takes the high-water mark within the time is left alone, however long that goes on."""
    app = Floods()
    it = Rig(app, send_timeout=60)
    it.feed(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    for _ in range(300):
        it.wait(1)
        if app.end is None:
            it.transport.peer_reads(rate)
            it.service.loop.run()
    assert (app.end == SLOW) is cut
    it.close()


def test_a_reader_may_have_all_the_time() -> None:
    app = Floods()
    it = Rig(app, send_timeout=None)
    it.feed(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    it.wait(100_000)
    assert app.end is None
    it.close()


class Never:
    """Sends far more than is sensible, and awaits nothing but send()."""

    def __init__(self, **part: Any) -> None:
        self.part = {"type": "http.response.body", "body": b"x" * 100, "more_body": True, **part}
        self.sent = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        while self.sent < 20_000:
            await send(self.part)
            self.sent += 1


@pytest.mark.parametrize(
    ("method", "part", "policy"),
    [("HEAD", {}, "cancel"), ("GET", {"body": b""}, "cancel"), ("GET", {}, "ignore")],
)
def test_who_writes_nothing_to_the_wire_gives_way_too(method: str, part: Any, policy: str) -> None:
    app = Never(**part)
    it = Rig(app, disconnect_policy=[f"*={policy}"])
    it.transport.feed(f"{method} / HTTP/1.1\r\nhost: a\r\n\r\n".encode())
    if policy == "ignore":
        it.transport.feed_reset()
    it.service.loop.run()
    assert 0 < app.sent < 20_000
    it.close()


@pytest.fixture(params=list(LOOPS))
def loop(request: pytest.FixtureRequest) -> Any:
    return request.param


HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@pytest.mark.parametrize("head", [b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", HANDSHAKE], ids=["http", "websocket"])
def test_a_real_reader_that_stops(loop: str, head: bytes) -> None:
    async def main() -> None:
        app = Floods()
        flat = {"send_timeout": 0.3, "ws_cancel_grace": 0.1, "lifespan": "off"}
        async with serving(app, **flat) as worker:
            async with await Client.open(worker, receive_buffer=4096) as client:
                await client.send(head)
                await client.read(100)
                await eventually(lambda: app.end)
                if head is HANDSHAKE:  # it was sending: that raises before the grace is over
                    assert app.end == "disconnected"
                else:
                    assert app.end == SLOW
                await eventually(lambda: not worker.connections and not worker.running)

    run(loop, main)


def test_a_real_reader_that_is_slow(loop: str) -> None:
    """64 KiB within the time is enough, though the kernel asks for more in steps that are larger."""

    async def main() -> None:
        app = Floods()
        async with serving(app, send_timeout=0.4, lifespan="off") as worker:
            async with await Client.open(worker, receive_buffer=65536) as client:
                await client.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
                await eventually(lambda: app.sent)
                for _ in range(20):
                    await asyncio.sleep(0.1)
                    taken = 0
                    while taken < 100_000:
                        taken += len(await client.read(100_000 - taken))
                    client.received.clear()
                assert app.end is None
                assert worker.running

    run(loop, main)


def test_a_file_for_a_reader_that_stops(loop: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(20_000_000))
    ends: list[Any] = []

    async def sends(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        try:
            await send({"type": "http.response.pathsend", "path": str(path)})
        except asyncio.CancelledError as error:
            ends.append(error.args)
            raise

    async def main() -> None:
        async with serving(sends, send_timeout=0.3, lifespan="off") as worker:
            async with await Client.open(worker, receive_buffer=4096) as client:
                await client.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
                await client.read(100)
                await eventually(lambda: ends)
                assert ends == [("slow_reader",)]
                await eventually(lambda: not worker.connections and not worker.running)

    run(loop, main)


def test_a_file_on_its_way_is_no_gap(loop: str, tmp_path: Path) -> None:
    """The kernel sends it, and the application waits in send() for as long as that takes."""
    path = tmp_path / "file"
    path.write_bytes(bytes(20_000_000))

    async def sends(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send({"type": "http.response.pathsend", "path": str(path)})

    async def main() -> None:
        async with serving(sends, response_gap_timeout=0.2, lifespan="off") as worker:
            async with await Client.open(worker, receive_buffer=4096) as client:
                await client.send(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
                await client.read(100)
                await asyncio.sleep(0.6)
                (answer,) = await client.read_all()
                assert answer.complete

    run(loop, main)


@pytest.mark.parametrize("how", ["reset", "abort"])
def test_a_reader_of_a_file_that_goes_leaves_nothing_behind(loop: str, tmp_path: Path, how: str) -> None:
    """And it is the client that has gone: no error of the application."""
    path = tmp_path / "file"
    path.write_bytes(bytes(20_000_000))
    ends: list[Any] = []

    async def sends(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        try:
            await send({"type": "http.response.pathsend", "path": str(path)})
        except BaseException as error:
            ends.append((type(error), error.args))
            raise

    async def main() -> None:
        async with serving(sends, lifespan="off") as worker:
            gc.collect()
            gc.disable()
            try:
                for turns in range(20):
                    client = await Client.open(worker, receive_buffer=4096)
                    await client.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
                    await client.read(100)
                    await asyncio.sleep(0.02 * (turns % 2))
                    refs = [weakref.ref(it) for it in worker.connections]
                    assert refs
                    if how == "reset":
                        client.reset()
                    else:
                        next(iter(worker.connections)).abort()
                    await eventually(lambda: not worker.connections and not worker.running)
                    await asyncio.sleep(0)
                    client.sock.close()
                    assert [ref() for ref in refs] == [None]
            finally:
                gc.enable()
            assert set(ends) == {(asyncio.CancelledError, ("client_gone",))}
            assert len(ends) == 20

    run(loop, main)


def test_an_answer_that_its_reader_leaves_lying_does_not_look_complete(loop: str) -> None:
    """To a client of HTTP/1.0 the end of the connection is the end of the body."""

    async def sends(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body", "body": bytes(20_000_000)})

    async def main() -> None:
        async with serving(sends, linger_timeout=0.2, lifespan="off") as worker:
            async with await Client.open(worker, receive_buffer=4096) as client:
                await client.send(b"GET / HTTP/1.0\r\n\r\n")
                await client.read(100)
                await eventually(lambda: not worker.connections)
                with pytest.raises(ConnectionResetError):
                    await client.read_all()

    run(loop, main)
