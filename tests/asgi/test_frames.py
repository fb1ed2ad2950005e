"""Reading in turns: bounded work, back-pressure, pongs, faults."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

from leanserve.asgi import frames
from leanserve.asgi.frames import FrameReader
from leanserve.asgi.heartbeat import Heartbeat
from leanserve.errors import RemoteProtocolError
from leanserve.protocol.deflate import negotiate_deflate
from leanserve.protocol.fastframes import FrameRecogniser
from leanserve.protocol.websocket import Close, WebSocketCodec
from leanserve.transport.flow import WriteGate
from ws_frames import BINARY, PING, PONG, TEXT, close, deflated, frame, parse


class MemoryConnection:
    """What a reader asks of its connection."""

    def __init__(self) -> None:
        self.gate = WriteGate()
        self.written = b""
        self.reading = True
        self.deadline: float | None = None
        self.service = self

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def write(self, data: bytes) -> None:
        self.written += data

    def pause_reading(self) -> None:
        assert self.reading, "paused twice"
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.reading, "resumed twice"
        self.reading = True

    def set_deadline(self, seconds: float | None) -> None:
        self.deadline = seconds

    def sent(self) -> list[tuple[int, bytes]]:
        return [(opcode, payload) for opcode, _, payload in parse(self.written)]


class Notes:
    """A listener that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.wanting = True
        self.idle = True
        self.exhausted_count = 0

    def wants_more(self) -> bool:
        return self.wanting

    def is_idle(self) -> bool:
        return self.idle

    def message_received(self, message: str | bytes) -> bool:
        self.told.append(message)
        return self.wanting

    def close_received(self, event: Close) -> None:
        self.told.append(event.code)

    def violated(self, error: RemoteProtocolError) -> None:
        self.told.append(error.close_code)

    def exhausted(self) -> None:
        self.exhausted_count += 1


RECOGNISER: FrameRecogniser | None = None


@pytest.fixture(autouse=True, params=["recognised", "strict"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways: with the recogniser in front of wsproto, and without."""
    recogniser = FrameRecogniser() if request.param == "recognised" else None
    monkeypatch.setattr(sys.modules[__name__], "RECOGNISER", recogniser)


class Clock:
    """Time passes with each look at it, and not because the machine has other work."""

    step_s = 0.0

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        self._now += self.step_s
        return self._now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(frames, "time", made)
    return made


def new(size: int = 1 << 24, **facts: Any) -> tuple[FrameReader, MemoryConnection, Notes]:
    connection, notes = MemoryConnection(), Notes()
    codec = WebSocketCodec(max_size_bytes=size, max_fragments=10_000, recogniser=RECOGNISER, **facts)
    heartbeat = Heartbeat(20, 20)
    return FrameReader(connection, codec, heartbeat, notes), connection, notes  # type: ignore[arg-type]


def test_messages_and_close() -> None:
    reader, connection, notes = new()
    reader.data_received(frame(TEXT, b"a") + frame(BINARY, b"b") + frame(PONG, b"x") + close(1000))
    assert notes.told == ["a", b"b", 1000]
    assert connection.written == b""


def test_each_ping_of_a_few_is_answered_in_order() -> None:
    reader, connection, _ = new()
    reader.data_received(b"".join(frame(PING, b"%d" % i) for i in range(16)))
    assert connection.sent() == [(PONG, b"%d" % i) for i in range(16)]


def test_a_ping_before_a_close_in_one_read_is_answered_first() -> None:
    reader, connection, notes = new()
    sent_before: list[Any] = []
    notes.close_received = lambda event: sent_before.extend(connection.sent())  # type: ignore[method-assign]
    reader.data_received(frame(PING, b"q") + close(1000))
    assert sent_before == [(PONG, b"q")]


def test_of_many_pings_the_latest_is_answered(clock: Clock) -> None:
    clock.step_s = 1e-5

    async def main() -> None:
        reader, connection, _ = new()
        reader.data_received(b"".join(frame(PING, b"%05d" % i) for i in range(5000)))
        while reader.paused:
            await asyncio.sleep(0)
        pongs = connection.sent()
        assert pongs[-1] == (PONG, b"04999")
        assert len(pongs) < 2500
        assert pongs == sorted(pongs)

    asyncio.run(main())


def test_a_flood_is_dealt_with_in_turns(clock: Clock) -> None:
    clock.step_s = 1e-5

    async def main() -> None:
        reader, connection, notes = new()
        reader.data_received(frame(BINARY, b"x" * 4) * 30_000)
        assert 0 < len(notes.told) < 30_000
        assert reader.paused
        assert not connection.reading
        before = len(notes.told)
        reader.data_received(b"")  # what still comes does not begin a second turn
        assert len(notes.told) == before
        turns = 0
        while reader.paused:
            await asyncio.sleep(0)
            turns += 1
        assert turns > 5
        assert len(notes.told) == 30_000
        assert connection.reading

    asyncio.run(main())


def test_a_bomb_ends_its_turn_after_every_piece(clock: Clock) -> None:
    clock.step_s = 0.003

    async def main() -> None:
        agreed = negotiate_deflate(["permessage-deflate"], 1 << 24)
        assert agreed is not None
        reader, _, notes = new(deflate=agreed[0])
        reader.data_received(frame(BINARY, deflated(bytes(64 << 20)), rsv=4))
        turns = 1
        while reader.paused:
            await asyncio.sleep(0)
            turns += 1
        assert notes.told == [1009]
        assert turns > 3

    asyncio.run(main())


def test_a_listener_that_has_enough_stops_the_reading() -> None:
    async def main() -> None:
        reader, connection, notes = new()
        notes.wanting = False
        reader.data_received(frame(TEXT, b"a") + frame(TEXT, b"b"))
        assert notes.told == []
        assert not connection.reading
        reader.go_on()
        await asyncio.sleep(0)
        assert not connection.reading
        notes.wanting = True
        reader.go_on()
        reader.go_on()
        assert notes.told == []  # not within the listener's own call, however often it asks
        await asyncio.sleep(0)
        assert notes.told == ["a", "b"]
        assert connection.reading
        reader.go_on()
        await asyncio.sleep(0)
        assert notes.exhausted_count == 1

    asyncio.run(main())


def test_a_pong_waits_for_a_peer_that_reads() -> None:
    reader, connection, _ = new()
    reader.start(100.0)
    connection.gate.pause()
    reader.data_received(frame(PING, b"0"))
    reader.data_received(frame(PING, b"1") + frame(PING, b"2"))
    assert connection.written == b""
    assert connection.deadline == 0.5
    assert reader.beat(100.5)
    assert connection.written == b""
    assert connection.deadline == 0.5
    connection.gate.resume()
    assert reader.beat(101.0)
    assert connection.sent() == [(PONG, b"2")]
    assert connection.deadline == 19.0


def test_pings_of_ours() -> None:
    reader, connection, _ = new()
    reader.start(100.0)
    assert connection.deadline == 20.0
    assert reader.beat(120.0)
    assert connection.sent() == [(PING, b"")]
    reader.data_received(frame(PONG))
    assert reader.beat(140.0)
    assert reader.beat(160.0)
    assert not reader.beat(161.0)


def test_a_peer_that_we_do_not_read_from_is_not_dead() -> None:
    reader, _, notes = new()
    reader.start(100.0)
    notes.wanting = False
    reader.data_received(frame(TEXT, b"x"))
    assert all(reader.beat(100.0 + second) for second in range(200))


@pytest.mark.parametrize("idle", [True, False])
def test_a_fault_is_told_when_the_listener_is_idle(idle: bool) -> None:
    reader, connection, notes = new()
    notes.idle = idle
    reader.data_received(frame(TEXT, b"a") + frame(TEXT, b"b", rsv=2) + frame(TEXT, b"c"))
    if not idle:
        assert notes.told == ["a"]
        assert connection.deadline == 1.0
        reader.settle()
    assert notes.told == ["a", 1002]
    reader.settle()
    reader.data_received(frame(TEXT, b"c"))
    assert notes.told == ["a", 1002]


def test_a_fault_is_told_at_the_deadline_at_the_latest() -> None:
    reader, _, notes = new()
    notes.idle = False
    reader.data_received(frame(TEXT, b"a", mask=None))
    assert notes.told == []
    assert reader.beat(101.0)
    assert notes.told == [1002]


def test_nothing_is_answered_behind_our_close() -> None:
    codec = WebSocketCodec(max_size_bytes=100, max_fragments=10, recogniser=RECOGNISER)
    connection, notes = MemoryConnection(), Notes()
    reader = FrameReader(connection, codec, Heartbeat(20, 20), notes)  # type: ignore[arg-type]
    codec.close()
    reader.data_received(frame(PING, b"x") + close(1000))
    assert connection.written == b""
    assert notes.told == [1000]
