"""The fakes behave like what they stand for: one set of checks, on the fake, on asyncio and on uvloop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from fakes import FakeLoop, FakeTransport

BIG = b"x" * 4_000_000


class Recorder(asyncio.Protocol):
    """Writes down what it is told."""

    def __init__(self, *, keep_open: bool = False) -> None:
        self.told: list[Any] = []
        self.keep_open = keep_open
        self.lost = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self.told.append("made")
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.told.append(data)

    def eof_received(self) -> bool:
        self.told.append("eof")
        return self.keep_open

    def pause_writing(self) -> None:
        self.told.append("pause")

    def resume_writing(self) -> None:
        self.told.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.told.append(("lost", type(exc)))
        self.lost.set()


class FakePair:
    """A fake transport, driven by its own methods."""

    def __init__(self, protocol: Recorder) -> None:
        self.loop = FakeLoop()
        self.transport = FakeTransport(self.loop, protocol)

    async def settle(self) -> None:
        self.loop.run()

    async def send(self, data: bytes) -> None:
        self.transport.feed(data)

    async def send_eof(self) -> None:
        self.transport.feed_eof()

    async def read_all(self, size: int) -> bytes:
        return self.transport.peer_reads()

    def close(self) -> None:
        pass


class RealPair:
    """A socket pair, one end of which the running loop has."""

    def __init__(self) -> None:
        ends = socket.socketpair()
        for end in ends:
            end.setblocking(False)
        self.ours, self.peer = ends

    async def settle(self) -> None:
        for _ in range(4):
            await asyncio.sleep(0.005)

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.peer, data)
        await self.settle()

    async def send_eof(self) -> None:
        self.peer.shutdown(socket.SHUT_WR)
        await self.settle()

    async def read_all(self, size: int) -> bytes:
        got = bytearray()
        while len(got) < size:
            data = await asyncio.get_running_loop().sock_recv(self.peer, 1 << 20)
            if not data:
                break
            got += data
        await self.settle()
        return bytes(got)

    def close(self) -> None:
        self.peer.close()


@asynccontextmanager
async def paired(kind: str, protocol: Recorder) -> AsyncIterator[Any]:
    if kind == "fake":
        yield FakePair(protocol)
        return
    pair = RealPair()
    await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, pair.ours)
    try:
        yield pair
    finally:
        if not protocol.lost.is_set():
            protocol.transport.abort()
        pair.close()
        await protocol.lost.wait()


@pytest.fixture(params=["fake", "asyncio", "uvloop"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(kind: str, coroutine: Any) -> None:
    factory = uvloop.new_event_loop if kind == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(coroutine)


def test_data_and_an_end_that_closes(kind: str) -> None:
    async def check() -> None:
        protocol = Recorder()
        async with paired(kind, protocol) as pair:
            await pair.send(b"one")
            await pair.send_eof()
            await pair.settle()
            assert protocol.told == ["made", b"one", "eof", ("lost", type(None))]
            assert protocol.transport.is_closing()

    run(kind, check())


def test_writing_behind_a_close(kind: str) -> None:
    """Until connection_lost it is dropped; after that asyncio drops it and uvloop raises."""

    async def check() -> None:
        protocol = Recorder()
        async with paired(kind, protocol) as pair:
            protocol.transport.close()
            protocol.transport.write(b"late")
            protocol.transport.set_write_buffer_limits(high=1, low=0)
            await pair.settle()
            assert protocol.told == ["made", ("lost", type(None))]
            if kind != "asyncio":
                with pytest.raises(RuntimeError):
                    protocol.transport.write(b"too late")
                with pytest.raises(RuntimeError):
                    protocol.transport.set_write_buffer_limits(high=1, low=0)

    run(kind, check())


def test_an_end_that_keeps_our_side_open(kind: str) -> None:
    async def check() -> None:
        protocol = Recorder(keep_open=True)
        async with paired(kind, protocol) as pair:
            await pair.send_eof()
            await pair.settle()
            assert protocol.told == ["made", "eof"]
            assert not protocol.transport.is_closing()
            protocol.transport.write(b"answer")
            assert await pair.read_all(6) == b"answer"
            protocol.transport.close()
            await pair.settle()
            assert protocol.told[2:] == [("lost", type(None))]

    run(kind, check())


def test_our_end_forbids_writing_and_allows_reading(kind: str) -> None:
    async def check() -> None:
        protocol = Recorder()
        async with paired(kind, protocol) as pair:
            assert protocol.transport.can_write_eof()
            protocol.transport.write(b"last")
            protocol.transport.write_eof()
            with pytest.raises(RuntimeError):
                protocol.transport.write(b"more")
            assert await pair.read_all(5) == b"last"
            await pair.send(b"still")
            assert protocol.told == ["made", b"still"]

    run(kind, check())


def test_paused_reading(kind: str) -> None:
    async def check() -> None:
        protocol = Recorder()
        async with paired(kind, protocol) as pair:
            assert protocol.transport.is_reading()
            protocol.transport.pause_reading()
            assert not protocol.transport.is_reading()
            await pair.send(b"held")
            await pair.send_eof()
            await pair.settle()
            assert protocol.told == ["made"]
            protocol.transport.resume_reading()
            assert protocol.transport.is_reading()
            await pair.settle()
            assert protocol.told == ["made", b"held", "eof", ("lost", type(None))]
            assert not protocol.transport.is_reading()

    run(kind, check())


def test_writing_pauses_and_resumes(kind: str) -> None:
    async def check() -> None:
        protocol = Recorder()
        async with paired(kind, protocol) as pair:
            protocol.transport.set_write_buffer_limits(high=65536, low=16384)
            assert protocol.transport.get_write_buffer_limits() == (16384, 65536)
            assert protocol.transport.get_write_buffer_size() == 0
            protocol.transport.write(BIG)
            await pair.settle()
            assert protocol.told == ["made", "pause"]
            assert protocol.transport.get_write_buffer_size() > 65536
            protocol.transport.close()  # what is written is still sent
            await pair.settle()
            assert protocol.told == ["made", "pause"]
            assert await pair.read_all(len(BIG)) == BIG
            await pair.settle()
            assert protocol.told[-1] == ("lost", type(None))

    run(kind, check())


def test_lower_limits_count_at_once(kind: str) -> None:
    async def check() -> None:
        protocol = Recorder()
        async with paired(kind, protocol) as pair:
            protocol.transport.set_write_buffer_limits(high=len(BIG), low=16384)
            protocol.transport.write(BIG)
            await pair.settle()
            assert protocol.told == ["made"]
            protocol.transport.set_write_buffer_limits(high=0, low=0)
            assert protocol.told == ["made", "pause"]
            assert len(await pair.read_all(len(BIG))) == len(BIG)
            await pair.settle()
            assert protocol.told == ["made", "pause", "resume"]

    run(kind, check())


def test_abort_drops_what_is_unsent_and_tells_later(kind: str) -> None:
    async def check() -> None:
        protocol = Recorder()
        async with paired(kind, protocol) as pair:
            protocol.transport.write(BIG)
            protocol.transport.abort()
            assert ("lost", type(None)) not in protocol.told
            assert protocol.transport.is_closing()
            protocol.transport.write(b"late")
            protocol.transport.abort()
            protocol.transport.close()
            await pair.settle()
            assert protocol.told.count(("lost", type(None))) == 1
            assert protocol.transport.get_write_buffer_size() == 0

    run(kind, check())


def test_timers_fire_in_order_and_not_when_cancelled() -> None:
    loop, fired = FakeLoop(), []
    loop.call_at(loop.time() + 2, fired.append, "b")
    loop.call_at(loop.time() + 1, fired.append, "a")
    loop.call_at(loop.time() + 1.5, fired.append, "never").cancel()
    assert loop.armed == 2
    loop.pass_time(1)
    assert fired == ["a"]
    loop.pass_time(5)
    assert fired == ["a", "b"]
    assert loop.time() == 1006
    assert loop.armed == 0
