"""Streams of WebSocket frames, and messages sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any, NamedTuple, Self

from wsproto.frame_protocol import FrameProtocol

from both_ways import new_websocket, read_frames
from fuzz import Difference, Kind
from fuzz.http import cut_anywhere, fewer, flip_bit
from leanserve.protocol.fastframes import FrameRecogniser
from ws_frames import BINARY, CLOSE, CONT, PING, PONG, TEXT, close, deflated, frame, long_form

__all__ = ["Frames"]

# Most messages meet a small limit: long ones take their time. The long limit is beyond a length of two bytes.
_LIMITS = (1000, 70_000)
_SIZES = [
    *(0, 0, 1, 2, 3, 5, 8, 13, 40, 124, 125, 126, 127, 128),
    *(383, 384, 385, 767, 768, 775, 999, 1000, 1001),
]
_LONG_SIZES = [65_535, 65_536, 65_537, 69_999, 70_000, 70_001]
_TEXTS = ["", "a", "hello, world", "Grüße", "世界", "🌍", "a" * 125, "ü" * 63, "🌍" * 200, "\0", "\ufeff"]
_NOT_UTF8 = [
    *(b"\xff", b"\x80", b"\xc0\xaf", b"\xc3", b"\xe2\x82", b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xf0\x9f\x8c"),
    *(b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xe0\x80\x80", b"a\xc3(", b"\xf0\x80\x80\x80"),
    b"\xc3\xbc\xc3",
]
_CODES = [999, 1000, 1001, 1004, 1005, 1006, 1007, 1011, 1015, 1016, 2999, 3000, 4999, 5000, 65535]
_BLOCK = bytes(range(256)) * 280


class FrameStream(NamedTuple):
    """What a connection reads, read by read, and one message that it sends.

    Attributes:
        in_one_step: whether reads are offered to ``receive_message`` first.
    """

    pieces: tuple[bytes, ...]
    long: bool
    compressed: bool
    in_one_step: bool
    sent: str | bytes


class Frames(Kind[FrameStream]):
    """Frames of every kind, cut anywhere: a codec with a recogniser and one without."""

    name, number = "frames", 4

    def __init__(self, recogniser: Callable[[], FrameRecogniser] = FrameRecogniser) -> None:
        super().__init__()
        self.subject = recogniser
        self._recogniser = recogniser()

    def make(self, random: Random) -> FrameStream:
        long = random.random() < 0.01
        compressed = random.random() < 0.2
        wrong = 0.4 if long else 0.15 if random.random() < 0.4 else 0.0
        wire = b"".join(
            _make_wrong(random) if random.random() < wrong else _make_good(random, long, compressed)
            for _ in range(random.choice((1, 1, 2, 3, 5)))
        )
        if random.random() < 0.25:
            wire = _mutate(random, wire)
        sent: str | bytes = random.choice(_TEXTS) * random.choice((1, 1, 2, 9))
        if random.random() < 0.5:
            sent = _BLOCK[: random.choice(_LONG_SIZES if long else _SIZES)]
        return FrameStream(cut_anywhere(random, wire), long, compressed, random.random() < 0.5, sent)

    def compare(self, case: FrameStream) -> None:
        recogniser, limit = self._recogniser, _LIMITS[case.long]
        strict = read_frames(case.pieces, new_websocket(None, limit=limit, compressed=case.compressed))
        before = recogniser.recognised, recogniser.declined
        codec = new_websocket(recogniser, limit=limit, compressed=case.compressed)
        fast = read_frames(case.pieces, codec, in_one_step=case.in_one_step)
        self.recognised += recogniser.recognised - before[0]
        self.declined += recogniser.declined - before[1]
        if any(type(event) is int for events in strict for event in events):
            self.refused += 1
        if fast != strict or _types(fast) != _types(strict):
            raise Difference(fast, strict)
        if case.compressed:
            return  # made by wsproto itself, with a compressor that remembers
        text = case.sent
        sent = b"".join(codec.send_text(text) if isinstance(text, str) else codec.send_bytes(text))
        expected = FrameProtocol(client=False, extensions=[]).send_data(case.sent)
        if sent != expected:
            raise Difference(sent, expected)

    def anew(self) -> Self:
        return type(self)(self.subject)

    def smaller(self, case: FrameStream) -> Iterator[FrameStream]:
        for pieces in fewer(case.pieces):
            yield case._replace(pieces=pieces)


def _types(events: list[list[Any]]) -> list[type]:
    """A bytearray equals bytes, and is not the same."""
    return [type(event) for some in events for event in some]


def _make_good(random: Random, long: bool, compressed: bool) -> bytes:
    way, mask = random.random(), random.randbytes(4)
    if way < 0.35:
        return frame(TEXT, random.choice(_TEXTS).encode(), mask=mask)
    if way < 0.65:
        sizes = _LONG_SIZES if long and random.random() < 0.5 else _SIZES
        return frame(BINARY, _BLOCK[: random.choice(sizes)], mask=mask)
    if way < 0.75:
        return frame(random.choice((PING, PONG)), _BLOCK[: random.choice((0, 1, 5, 125))], mask=mask)
    if way < 0.87:
        return _make_fragments(random)
    if way < 0.95 and compressed:
        return _make_compressed(random)
    if way < 0.97:
        return close(random.choice(_CODES), random.choice((b"", b"bye", b"\xff", b"x" * 123)))
    return frame(TEXT, random.choice(_TEXTS).encode(), mask=random.choice((mask, bytes(4))))


def _make_fragments(random: Random) -> bytes:
    data = "".join(random.choice(_TEXTS) for _ in range(3)).encode()
    size = max(random.choice((1, 2, 7, 50, 400)), len(data) // 30)
    pieces = [data[at : at + size] for at in range(0, len(data), size)] or [b""]
    opcode, wire = random.choice((TEXT, BINARY)), b""
    for piece in pieces[:-1]:
        wire += frame(opcode, piece, fin=False)
        opcode = CONT
        if random.random() < 0.1:
            wire += frame(random.choice((PING, PONG)), b"between")
    return wire + frame(opcode, pieces[-1])


def _make_compressed(random: Random) -> bytes:
    data = deflated(random.choice(_TEXTS).encode() * random.choice((1, 1, 2, 30)))
    opcode, at = random.choice((TEXT, TEXT, BINARY)), random.randrange(len(data) + 1)
    if random.random() < 0.5:
        return frame(opcode, data, rsv=4)
    between = frame(PING) if random.random() < 0.3 else b""
    return frame(opcode, data[:at], rsv=4, fin=False) + between + frame(CONT, data[at:])


def _make_wrong(random: Random) -> bytes:
    way, size = random.random(), random.choice((0, 125, 126, 1000, 1001, 65_535, 70_000, 70_001, 1 << 62))
    if way < 0.25:
        text = random.choice(_TEXTS).encode() + random.choice(_NOT_UTF8) + random.choice((b"", b"a"))
        return frame(TEXT, text, mask=random.randbytes(4))
    if way < 0.45:
        bytes_ = 2 if size < 1 << 16 and random.random() < 0.5 else 8
        return long_form(random.choice((TEXT, BINARY, PING, CLOSE)), size, bytes_=bytes_) + bytes(size % 1000)
    if way < 0.5:
        return long_form(random.choice((TEXT, BINARY)), random.choice((1 << 63, (1 << 64) - 1)), bytes_=8)
    if way < 0.6:
        return random.randbytes(random.randrange(1, 20))
    return frame(
        random.randrange(16), _BLOCK[: random.choice((0, 1, 5, 125, 126, 300))],
        fin=random.random() < 0.7, rsv=random.choice((0, 0, 1, 2, 4)),
        mask=random.choice((None, random.randbytes(4), random.randbytes(4))),
    )  # fmt: skip


def _mutate(random: Random, wire: bytes) -> bytes:
    """Without the lines of HTTP: bytes changed, left out, doubled."""
    at = random.randrange(len(wire) or 1)
    end = at + random.choice((1, 1, 2, 4, 9))
    way = random.randrange(5)
    if way == 0:
        return flip_bit(random, wire)
    if way == 1:
        return wire[:at] + random.randbytes(end - at) + wire[end:]
    if way == 2:
        return wire[:at] + wire[end:]
    if way == 3:
        return wire[:end] + wire[at:]
    return wire[:at] + frame(random.choice((TEXT, PING, CONT)), b"within") + wire[at:]
