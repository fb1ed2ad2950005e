"""Frames in, events out: every cut gives the same, violations have their close codes, all is bounded."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leanserve.errors import AppProtocolError, RemoteProtocolError
from leanserve.protocol.deflate import BoundedDeflate, negotiate_deflate
from leanserve.protocol.fastframes import FrameRecogniser
from leanserve.protocol.websocket import (
    Close,
    Partial,
    Ping,
    Pong,
    WebSocketCodec,
    WebSocketEvent,
)
from ws_frames import BINARY, CLOSE, CONT, PING, PONG, TEXT, close, deflated, frame, header, parse

Seen = list[WebSocketEvent | int]


def deflate(size: int = 1 << 20, offer: str = "permessage-deflate") -> BoundedDeflate:
    found = negotiate_deflate([offer], size)
    assert found is not None
    return found[0]


RECOGNISER: FrameRecogniser | None = None


@pytest.fixture(autouse=True, params=["recognised", "strict"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways: with the recogniser in front of wsproto, and without."""
    recogniser = FrameRecogniser() if request.param == "recognised" else None
    monkeypatch.setattr(sys.modules[__name__], "RECOGNISER", recogniser)


def new(
    size: int = 1 << 20, fragments: int = 1000, extension: BoundedDeflate | None = None
) -> WebSocketCodec:
    return WebSocketCodec(
        max_size_bytes=size, max_fragments=fragments, deflate=extension, recogniser=RECOGNISER
    )


def drain(codec: WebSocketCodec) -> Iterator[WebSocketEvent]:
    """All events but Partial."""
    while (event := codec.next_event()) is not None:
        if not isinstance(event, Partial):
            yield event


def read(pieces: Iterable[bytes], codec: WebSocketCodec | None = None) -> Seen:
    """Events of the pieces; a violation is its close code, and nothing may follow it."""
    codec = codec or new()
    seen: Seen = []
    for piece in pieces:
        codec.receive(piece)
        try:
            seen.extend(drain(codec))
        except RemoteProtocolError as error:
            seen.append(error.close_code)
    return seen


PLAIN = (
    frame(TEXT, b"Hello")
    + frame(BINARY, bytes(range(256)))
    + frame(TEXT, "Grüße, 世界 🌍".encode()[:9], fin=False)
    + frame(PING, b"p" * 125)
    + frame(CONT, "Grüße, 世界 🌍".encode()[9:13], fin=False)
    + frame(PONG)
    + frame(CONT, b"", fin=False)
    + frame(CONT, "Grüße, 世界 🌍".encode()[13:])
    + frame(BINARY, b"a", fin=False, mask=b"\0\0\0\0")
    + frame(CONT, b"b" * 200, mask=b"\xff\xff\xff\xff")
    + frame(TEXT)
    + frame(BINARY)
    + frame(PING)
    + frame(TEXT, b"line\r\nline\rline\n", fin=False)
    + frame(CONT)
    + close(4001, "bye ü".encode())
)
PLAIN_EVENTS: Seen = [
    "Hello",
    bytes(range(256)),
    Ping(b"p" * 125),
    Pong(b""),
    "Grüße, 世界 🌍",
    b"a" + b"b" * 200,
    "",
    b"",
    Ping(b""),
    "line\r\nline\rline\n",
    Close(4001, "bye ü"),
]


def test_whole() -> None:
    assert read([PLAIN]) == PLAIN_EVENTS


def test_every_cut() -> None:
    for at in range(len(PLAIN)):
        assert read([PLAIN[:at], PLAIN[at:]]) == PLAIN_EVENTS, at


def test_byte_by_byte() -> None:
    assert read(PLAIN[i : i + 1] for i in range(len(PLAIN))) == PLAIN_EVENTS


def test_nothing_behind_a_close_is_read() -> None:
    codec = new()
    assert read([PLAIN + frame(TEXT, b"late"), frame(TEXT, b"later"), b"\xff" * 99], codec) == PLAIN_EVENTS
    assert codec.pending_bytes == 0


@settings(max_examples=60, deadline=None)
@given(
    messages=st.lists(st.one_of(st.text(max_size=300), st.binary(max_size=300)), max_size=6),
    chops=st.lists(st.integers(1, 97), min_size=1, max_size=8),
    cuts=st.lists(st.integers(1, 97), min_size=1, max_size=8),
    mask=st.binary(min_size=4, max_size=4),
    compress=st.booleans(),
)
def test_any_fragments_and_any_cuts(
    messages: list[str | bytes], chops: list[int], cuts: list[int], mask: bytes, compress: bool
) -> None:
    wire = b""
    for message in messages:
        raw = message.encode() if isinstance(message, str) else message
        parts = list(slices(deflated(raw) if compress else raw, chops)) or [b""]
        for number, part in enumerate(parts):
            opcode = CONT if number else TEXT if isinstance(message, str) else BINARY
            rsv = 4 if compress and not number else 0
            wire += frame(opcode, part, fin=number == len(parts) - 1, rsv=rsv, mask=mask) + frame(PONG)
    alone = "permessage-deflate; client_no_context_takeover"
    codec = new(extension=deflate(offer=alone) if compress else None)
    seen = [event for event in read(slices(wire, cuts), codec) if not isinstance(event, Pong)]
    assert seen == messages


def slices(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    at = turn = 0
    while at < len(data):
        yield data[at : at + sizes[turn % len(sizes)]]
        at, turn = at + sizes[turn % len(sizes)], turn + 1


# Violations


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (frame(TEXT, b"x", mask=None), 1002),
        (frame(TEXT, b"x", rsv=4), 1002),
        (frame(BINARY, b"x", rsv=2), 1002),
        (frame(PING, b"x", rsv=1), 1002),
        (frame(CLOSE, b"\x03\xe8", rsv=4), 1002),
        *((frame(opcode, b"x"), 1002) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
        (frame(PING, b"x", fin=False), 1002),
        (frame(PONG, b"x", fin=False), 1002),
        (frame(CLOSE, b"", fin=False), 1002),
        (frame(PING, b"x" * 126), 1002),
        (frame(CLOSE, b"\x03\xe8" + b"x" * 124), 1002),
        (frame(CONT, b"x"), 1002),
        (frame(CONT, b"x", fin=False), 1002),
        (frame(TEXT, b"x", fin=False) + frame(TEXT, b"y"), 1002),
        (frame(BINARY, b"x", fin=False) + frame(BINARY, b"y", fin=False), 1002),
        (b"\x81\xfe\x00\x05" + b"\0\0\0\0hello", 1002),
        (b"\x81\xff" + (300).to_bytes(8, "big") + b"\0\0\0\0" + b"x" * 300, 1002),
        (b"\x82\xff" + (1 << 63).to_bytes(8, "big"), 1002),
        (b"\x82\xff" + b"\xff" * 8, 1002),
        (frame(CLOSE, b"x"), 1002),
        *((close(code), 1002) for code in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999)),
        *((close(code), 1002) for code in (5000, 65535)),
        (close(1000, b"\xff"), 1007),
        (frame(TEXT, b"\xff"), 1007),
        (frame(TEXT, b"\xed\xa0\x80"), 1007),
        (frame(TEXT, b"\xc0\xaf"), 1007),
        (frame(TEXT, b"\xf4\x90\x80\x80"), 1007),
        (frame(TEXT, "ü".encode()[:1]), 1007),
        (frame(TEXT, "ü".encode()[:1], fin=False) + frame(CONT), 1007),
        (header(BINARY, (1 << 20) + 1), 1009),
        (header(BINARY, 1 << 62), 1009),
        (frame(BINARY, bytes(1 << 19), fin=False) + header(CONT, (1 << 19) + 1, fin=False), 1009),
    ],
)  # fmt: skip
def test_violations(wire: bytes, code: int) -> None:
    before = frame(TEXT, b"before")
    seen = read([before + wire + frame(TEXT, b"behind"), frame(TEXT, b"later")])
    assert seen == ["before", code]
    if len(wire) < 200:
        whole = before + wire
        assert read(whole[i : i + 1] for i in range(len(whole))) == seen


def test_invalid_utf8_fails_before_the_frame_is_complete() -> None:
    codec = new()
    head = header(TEXT, 1000, mask=b"\0\0\0\0")
    assert read([head + "κόσμε".encode() + b"\xf4"], codec) == []
    assert read([b"\x90"], codec) == [1007]


@pytest.mark.parametrize("code", [*range(1000, 1004), *range(1007, 1014), 3000, 3999, 4000, 4999])
def test_close_codes_of_the_peer(code: int) -> None:
    assert read([close(code, b"why")]) == [Close(code, "why")]


def test_close_without_a_code() -> None:
    assert read([close()]) == [Close(1005, "")]


# Bounds


def test_the_limit_is_exact() -> None:
    assert read([frame(BINARY, bytes(100))], new(100)) == [bytes(100)]
    assert read([frame(BINARY, bytes(101))], new(100)) == [1009]
    parts = [frame(TEXT, b"x" * 50, fin=False), frame(CONT, b"x" * 50)]
    assert read(parts * 2, new(100)) == ["x" * 100] * 2
    assert read([frame(TEXT, b"x" * 50, fin=False), frame(CONT, b"x" * 51)], new(100)) == [1009]
    # bytes count and not characters
    assert read([frame(TEXT, "ü".encode() * 51)], new(100)) == [1009]


def test_the_declared_length_is_enough() -> None:
    codec = new(100)
    codec.receive(header(BINARY, 1 << 30))
    with pytest.raises(RemoteProtocolError) as caught:
        codec.next_event()
    assert caught.value.close_code == 1009


def test_control_frames_do_not_count() -> None:
    ping = frame(PING, b"x" * 100)
    wire = ping + frame(BINARY, b"a" * 60, fin=False) + ping * 50 + frame(CONT, b"b" * 40) + ping
    seen = read([wire], new(100, fragments=2))
    assert [e for e in seen if not isinstance(e, Ping)] == [b"a" * 60 + b"b" * 40]


def test_fragments_are_counted() -> None:
    first, more, last = frame(TEXT, b"", fin=False), frame(CONT, b"", fin=False), frame(CONT, b"")
    assert read([first + more * 8 + last], new(fragments=10)) == [""]
    assert read([first + more * 9 + last], new(fragments=10)) == [1009]
    # a header that comes in pieces is one fragment
    wire = first + more * 8 + last
    assert read((wire[i : i + 1] for i in range(len(wire))), new(fragments=10)) == [""]


def test_fragments_of_64_bytes_are_free() -> None:
    first, more, last = frame(BINARY, bytes(64), fin=False), frame(CONT, bytes(64), fin=False), frame(CONT)
    assert read([first + more * 1000 + last], new(fragments=10)) == [bytes(64 * 1001)]
    small = frame(CONT, bytes(63), fin=False)
    assert read([first + small * 1000 + last], new(fragments=10)) == [1009]


def test_endless_empty_fragments_are_refused() -> None:
    codec, more = new(fragments=16384), frame(CONT, b"", fin=False)
    codec.receive(frame(BINARY, b"", fin=False) + more * 100_000)
    for _ in range(16384):
        assert isinstance(codec.next_event(), Partial)
    with pytest.raises(RemoteProtocolError) as caught:
        codec.next_event()
    assert caught.value.close_code == 1009
    assert codec.pending_bytes == 0


def test_one_call_is_one_frame() -> None:
    codec = new()
    codec.receive(frame(TEXT, b"a", fin=False) + frame(CONT, b"b", fin=False))
    codec.receive(frame(CONT, b"c") + frame(PING))
    assert [type(codec.next_event()) for _ in range(5)] == [Partial, Partial, str, Ping, type(None)]


def test_a_long_message_in_small_pieces_is_held_in_little_memory() -> None:
    import tracemalloc

    size = 50_000
    for opcode in (TEXT, BINARY):
        codec, payload = new(), frame(opcode, b"x" * size, mask=b"\0\0\0\0")
        tracemalloc.start()
        for i in range(0, len(payload) - 2, 2):
            codec.receive(payload[i : i + 2])
            assert codec.next_event() in (None, Partial())
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < 3 * size


@pytest.mark.parametrize("inflated", [64 << 20, (1 << 24) + 1])
def test_a_bomb_stops_at_the_limit(inflated: int) -> None:
    bomb = deflated(bytes(inflated))
    codec = new(1 << 24, extension=deflate(1 << 24))
    codec.receive(frame(BINARY, bomb, rsv=4))
    slowest, code = 0.0, None
    while code is None:
        began = time.thread_time()
        try:
            assert isinstance(codec.next_event(), Partial)
        except RemoteProtocolError as error:
            code = error.close_code
        slowest = max(slowest, time.thread_time() - began)
    print(f"slowest call: {slowest:.4f} s")
    assert code == 1009
    assert slowest < 0.25  # in practice some milliseconds; wsproto alone takes a second


def test_a_message_of_the_limit_that_does_not_compress() -> None:
    import random

    noise = random.Random(1).randbytes(100_000)
    data = deflated(noise)
    assert len(data) > len(noise)
    codec = new(100_000, extension=deflate(100_000))
    assert read([frame(BINARY, data, rsv=4)], codec) == [noise]


def test_compressed_length_is_bounded_too() -> None:
    codec = new(1000, extension=deflate(1000))
    assert read([header(BINARY, 10_000, rsv=4)], codec) == [1009]


def test_compressed_messages() -> None:
    wire = (
        frame(TEXT, deflated("Grüße".encode()), rsv=4)
        + frame(TEXT, "Grüße".encode())
        + frame(BINARY, deflated(b"x" * 50_000)[:5], rsv=4, fin=False)
        + frame(PING, b"in between")
        + frame(CONT, deflated(b"x" * 50_000)[5:])
    )
    expected: Seen = ["Grüße"] * 2 + [Ping(b"in between"), b"x" * 50_000]
    offer = "permessage-deflate; client_no_context_takeover"
    for at in range(len(wire)):
        assert read([wire[:at], wire[at:]], new(extension=deflate(offer=offer))) == expected, at


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (frame(TEXT, b"\xff" * 20, rsv=4), 1007),
        (frame(TEXT, deflated(b"\xff"), rsv=4), 1007),
        (frame(BINARY, b"x", rsv=6), 1002),
        (frame(PING, b"x", rsv=4), 1002),
        (frame(BINARY, b"", fin=False) + frame(CONT, b"x", rsv=4), 1002),
    ],
)
def test_compressed_violations(wire: bytes, code: int) -> None:
    assert read([wire], new(extension=deflate())) == [code]


# Sending


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 200_000, 300_000])
def test_messages_out(size: int) -> None:
    codec = new()
    assert list(parse(b"".join(codec.send_bytes(b"x" * size)))) == [(BINARY, 0, b"x" * size)]
    assert list(parse(b"".join(codec.send_text("x" * size)))) == [(TEXT, 0, b"x" * size)]


def test_a_large_payload_is_not_copied() -> None:
    data = bytes(300_000)
    head, payload = new().send_bytes(data)
    assert len(head) == 10
    assert payload is data


def test_control_frames_out() -> None:
    codec = new()
    assert list(parse(codec.ping() + codec.ping(b"1") + codec.pong(b"2"))) == [
        (PING, 0, b""), (PING, 0, b"1"), (PONG, 0, b"2"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "reason", "payload"),
    [
        (1000, "", b"\x03\xe8"),
        (1005, "", b""),
        (1012, "restart", b"\x03\xf4restart"),
        (4999, "ü", b"\x13\x87\xc3\xbc"),
        (1000, "x" * 200, b"\x03\xe8" + b"x" * 123),
        (1000, "x" + "ü" * 100, b"\x03\xe8x" + "ü".encode() * 61),
    ],
)
def test_close_out(code: int, reason: str, payload: bytes) -> None:
    assert list(parse(new().close(code, reason))) == [(CLOSE, 0, payload)]


@pytest.mark.parametrize("code", [-1, 0, 999, 1004, 1006, 1015, 1016, 2999, 5000, 70000])
def test_codes_that_must_not_be_sent(code: int) -> None:
    with pytest.raises(AppProtocolError):
        new().close(code)


def test_nothing_is_said_behind_a_close() -> None:
    codec = new()
    assert codec.close() == b"\x88\x02\x03\xe8"
    assert codec.ping() == codec.pong(b"x") == b""


def test_what_utf8_cannot_say() -> None:
    with pytest.raises(AppProtocolError):
        new().send_text("\ud800")
    with pytest.raises(AppProtocolError):
        new().close(1000, "\ud800")


def test_compressed_messages_out_are_read_by_an_inflator() -> None:
    import zlib

    codec, inflator = new(extension=deflate()), zlib.decompressobj(-15)
    for text in ("Hello" * 30, "", "Hello" * 30, "x"):
        ((opcode, rsv, payload),) = parse(b"".join(codec.send_text(text)))
        assert (opcode, rsv) == (TEXT, 4)
        assert payload, "RFC 7692 section 7.2.3.6: an empty message is one byte"
        assert inflator.decompress(payload + b"\x00\x00\xff\xff") == text.encode()
    assert list(parse(codec.ping(b"x"))) == [(PING, 0, b"x")]
