"""The recogniser of frames against wsproto: the same events at the same byte, and no list of exceptions."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from wsproto.frame_protocol import FrameProtocol

from both_ways import cut, new_websocket, read_frames
from leanserve.protocol import fastframes
from leanserve.protocol.fastframes import FrameRecogniser, PartFrame, unmask
from leanserve.protocol.websocket import WebSocketCodec
from ws_frames import BINARY, CLOSE, CONT, PING, PONG, TEXT, close, deflated, frame, header, long_form

LIMIT = 70_000


@pytest.fixture(params=["numpy", "tables"])
def _unmasking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With numpy and without."""
    if request.param == "numpy":
        pytest.importorskip("numpy")  # which imports it
    else:
        monkeypatch.setitem(sys.modules, "numpy", None)  # importing it fails
        monkeypatch.setattr(fastframes, "_numpy", None)
    fastframes._begin_import.cache_clear()
    yield
    fastframes._begin_import.cache_clear()


def test_numpy_is_loaded_by_the_first_large_frame_and_not_in_its_way() -> None:
    pytest.importorskip("numpy")
    script = (
        "import sys, time\n"
        "from leanserve.protocol.fastframes import unmask\n"
        "assert unmask(bytes(700), 0, 700, b'abcd') == b'abcd' * 175\n"
        "assert 'numpy' not in sys.modules\n"
        "assert unmask(bytes(800), 0, 800, b'abcd') == b'abcd' * 200\n"
        "end = time.monotonic() + 30\n"
        "while not hasattr(sys.modules.get('numpy'), 'frombuffer') and time.monotonic() < end:\n"
        "    time.sleep(0.01)\n"
        "assert unmask(bytes(800), 0, 800, b'abcd') == b'abcd' * 200\n"
        "assert 'numpy' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def new(
    recogniser: FrameRecogniser | None, *, limit: int = LIMIT, compressed: bool = False
) -> WebSocketCodec:
    return new_websocket(recogniser, limit=limit, compressed=compressed)


def agree(pieces: list[bytes], *, limit: int = LIMIT, compressed: bool = False) -> FrameRecogniser:
    """Assert the rule; the recogniser, for its counters."""
    recogniser = FrameRecogniser()
    strict = read_frames(pieces, new(None, limit=limit, compressed=compressed))
    assert read_frames(pieces, new(recogniser, limit=limit, compressed=compressed)) == strict
    return recogniser


def test_plain_frames_are_recognised() -> None:
    wire = frame(TEXT, "Grüße".encode()) + frame(BINARY, b"\xff" * 126)
    wire += frame(TEXT) + frame(BINARY, b"x" * 65536)
    recogniser = FrameRecogniser()
    codec = new(recogniser)
    assert read_frames([wire], codec) == [["Grüße", b"\xff" * 126, "", b"x" * 65536]]
    assert (recogniser.recognised, recogniser.declined) == (4, 0)
    assert codec.drained


def test_the_result_says_how_far_it_goes() -> None:
    recogniser = FrameRecogniser()
    wire = b"behind" + frame(BINARY, b"abc") + b"rest"
    assert recogniser.recognise_frame(wire, 6, LIMIT) == (b"abc", 9)
    assert recogniser.recognise_frame(bytearray(wire), 6, LIMIT) == (b"abc", 9)
    assert recogniser.recognise_frame(wire[:14], 6, LIMIT) is not None
    part, size = recogniser.recognise_frame(wire[:14], 6, LIMIT) or (None, 0)
    assert isinstance(part, PartFrame)
    assert (part.missing_bytes, size) == (3, 6)
    assert recogniser.recognise_frame(wire[:11], 6, LIMIT) == (None, 0)
    assert recogniser.recognise_frame(wire, 6, 2) is None
    assert (recogniser.recognised, recogniser.declined) == (2, 1)


NOT_PLAIN = {
    "fragment": frame(TEXT, b"a", fin=False) + frame(CONT, b"b"),
    "compressed": frame(TEXT, deflated(b"abc"), rsv=4),
    "reserved bit": frame(BINARY, b"x", rsv=1),
    "ping": frame(PING, b"x"),
    "pong": frame(PONG, b"x" * 125),
    "close": close(1000),
    "unmasked": frame(BINARY, b"x", mask=None),
    "unmasked and long": frame(BINARY, b"x" * 300, mask=None),
    "unknown opcode": frame(3, b"x"),
    "not UTF-8": frame(TEXT, b"\xff"),
    "surrogate": frame(TEXT, b"\xed\xa0\x80"),
    "overlong": frame(TEXT, b"\xc0\xaf"),
    "cut character": frame(TEXT, "ü".encode()[:1]),
    "long form of a short length": long_form(BINARY, 125, bytes_=2) + bytes(125),
    "eight bytes for two": long_form(BINARY, 65535, bytes_=8) + bytes(65535),
    "highest bit": long_form(BINARY, 1 << 63, bytes_=8),
    "too long": long_form(BINARY, LIMIT + 1, bytes_=8),
}


@pytest.mark.parametrize("wire", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_is_not_plain_is_declined(wire: bytes) -> None:
    recogniser = FrameRecogniser()
    assert recogniser.recognise_frame(wire, 0, LIMIT) is None
    assert (recogniser.recognised, recogniser.declined) == (0, 1)
    before, behind = frame(TEXT, b"before"), frame(TEXT, b"behind")
    whole = before + wire + behind
    agree([whole], compressed=True)
    agree([whole])
    for at in range(len(whole)) if len(whole) < 1000 else (1, 12, 13, 14, 20, 26, 27, 5000):
        agree(cut(whole, [at]))


def test_what_is_behind_a_declined_frame_is_recognised_again() -> None:
    wire = frame(PING, b"x") + frame(TEXT, b"a")
    wire += frame(PING) + frame(TEXT, b"b", fin=False) + frame(PONG, b"y" * 125) + frame(CONT, b"c" * 300)
    wire += frame(BINARY, b"d") + frame(BINARY, b"e" * 66_000, fin=False) + frame(CONT) + frame(TEXT, b"f")
    recogniser = agree([wire])
    assert (recogniser.recognised, recogniser.declined) == (3, 4)
    for at in range(800):
        recogniser = agree(cut(wire, [at]))
        assert (recogniser.recognised, recogniser.declined) == (3, 4)


@pytest.mark.usefixtures("_unmasking")
def test_every_cut_of_plain_frames() -> None:
    text = "Grüße, 世界 🌍" * 20
    wire = frame(TEXT, text.encode()) + frame(BINARY, bytes(range(256)) * 4)
    wire += frame(TEXT, b"") + frame(TEXT, b"abc")
    for at in range(len(wire)):
        recogniser = agree(cut(wire, [at, at + 7]))
        assert (recogniser.recognised, recogniser.declined) == (4, 0)
    assert agree([wire[i : i + 1] for i in range(len(wire))]).recognised == 4


def test_text_that_is_not_utf8_is_told_before_the_end() -> None:
    wire = header(TEXT, 1000, mask=b"abcd") + frame(TEXT, b"x" * 50 + b"\xf4\x90", mask=b"abcd")[6:]
    recogniser = agree([wire[i : i + 1] for i in range(len(wire))])
    assert (recogniser.recognised, recogniser.declined) == (0, 1)
    assert read_frames([wire], new(FrameRecogniser())) == [[1007]]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 128, 65535, 65536, LIMIT])
def test_limits_are_the_same(size: int) -> None:
    for opcode, limit in itertools.product((TEXT, BINARY), (size - 1, size, size + 1)):
        wire = frame(opcode, b"x" * size)
        for at in (1, 2, 3, 4, 5, 6, 8, 10, 13, 14, 15, size // 2):
            agree(cut(wire, [at]), limit=max(limit, 0))


def test_uncompressed_messages_between_compressed_ones() -> None:
    once = frame(TEXT, b"plain") + frame(TEXT, deflated(b"small" * 9), rsv=4) + frame(BINARY, b"plain too")
    part = deflated(b"in two")
    once += frame(TEXT, part[:3], rsv=4, fin=False) + frame(PING) + frame(CONT, part[3:])
    once += frame(TEXT, b"end")
    recogniser = agree([once * 2], compressed=True)
    assert recogniser.recognised == 6
    for at in range(len(once)):
        assert agree(cut(once * 2, [at]), compressed=True).recognised == 6


# Anything


_payloads = st.one_of(
    st.binary(max_size=140),
    st.text(max_size=60).map(str.encode),
    st.sampled_from([b"\xff", b"\xed\xa0\x80", b"\xc0\xaf", "ü".encode()[:1], b"\xf4\x90"]),
    st.sampled_from([b"x" * 125, b"x" * 126]),
    st.sampled_from([65535, 65536, LIMIT, LIMIT + 1]).map(bytes),
)
_masks = st.binary(min_size=4, max_size=4)
_plain = st.builds(frame, st.sampled_from([TEXT, BINARY]), _payloads, mask=_masks)
_good = st.one_of(
    _plain,
    st.builds(lambda text, mask: frame(TEXT, text.encode(), mask=mask), st.text(max_size=80), _masks),
    st.builds(frame, st.sampled_from([PING, PONG]), st.binary(max_size=125)),
    st.builds(
        lambda data, at: frame(TEXT, data.encode()[:at], fin=False) + frame(CONT, data.encode()[at:]),
        st.text(max_size=40), st.integers(0, 40),
    ),
)  # fmt: skip
_bad = st.one_of(
    st.builds(
        frame, st.integers(0, 15), _payloads, fin=st.booleans(), rsv=st.sampled_from([0, 0, 1, 2, 4]),
        mask=st.none() | _masks,
    ),
    st.builds(
        long_form, st.sampled_from([TEXT, BINARY, PING, CLOSE]),
        st.sampled_from([0, 125, 126, 65535]), bytes_=st.sampled_from([2, 8]),
    ),
    st.sampled_from([LIMIT, LIMIT + 1]).map(lambda size: long_form(TEXT, size, bytes_=8)),
    st.sampled_from([1 << 62, 1 << 63, (1 << 64) - 1]).map(lambda size: long_form(BINARY, size, bytes_=8)),
    st.binary(max_size=20),
    st.just(frame(TEXT, deflated(b"compressed" * 5), rsv=4)),
)  # fmt: skip


@pytest.mark.usefixtures("_unmasking")
@settings(max_examples=400, deadline=None)
@given(
    frames=st.lists(st.one_of(_good, _good, _good, _bad), max_size=6),
    places=st.lists(st.integers(1, 400) | st.integers(1, 140_000), max_size=8),
    compressed=st.booleans(),
)
@example(frames=[frame(BINARY, bytes(66_000)), frame(PING)], places=[40_000], compressed=True)
def test_any_frames_and_any_cuts(frames: list[bytes], places: list[int], compressed: bool) -> None:
    agree(cut(b"".join(frames), places), compressed=compressed)


@settings(max_examples=60, deadline=None)
@given(frames=st.lists(st.one_of(_good, _bad).filter(lambda made: len(made) < 200), min_size=1, max_size=3))
def test_any_frames_at_every_cut(frames: list[bytes]) -> None:
    wire = b"".join(frames)
    agree([wire[i : i + 1] for i in range(len(wire))])
    for at in range(len(wire)):
        agree(cut(wire, [at]))


# In one step


def test_a_read_of_one_message_is_taken_in_one_step() -> None:
    recogniser = FrameRecogniser()
    codec = new(recogniser)
    assert codec.receive_message(frame(TEXT, b"one")) == "one"
    assert codec.drained
    assert codec.receive_message(frame(TEXT, b"two") + frame(PING)) == "two"
    assert not codec.drained
    assert codec.receive_message(frame(TEXT, b"three")) is None
    assert [type(codec.next_event()).__name__ for _ in range(3)] == ["Ping", "str", "NoneType"]
    long = frame(BINARY, bytes(1000))
    assert codec.receive_message(long[:500]) is None
    assert codec.receive_message(long[500:]) is None
    assert codec.next_event() == bytes(1000)
    assert codec.receive_message(b"") is None
    assert codec.receive_message(close()) is None
    assert codec.next_event() is not None
    assert codec.receive_message(frame(TEXT, b"late")) is None
    assert codec.next_event() is None
    assert new(None).receive_message(frame(TEXT, b"one")) is None


# Bounds


def test_each_byte_of_a_long_frame_is_unmasked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(data: bytes, start: int, end: int, key: bytes) -> bytes:
        sizes.append(end - start)
        return unmask(data, start, end, key)

    monkeypatch.setattr(fastframes, "unmask", counted)
    payload = bytes(range(256)) * 240
    wire = frame(BINARY, payload)
    codec = new(FrameRecogniser())
    events = read_frames(cut(wire, range(0, len(wire), 777)), codec)
    assert list(itertools.chain(*events)) == [payload]
    assert sum(sizes) < len(payload) + 8 * len(sizes)  # the last bytes of a piece are a piece of their own


def test_a_declared_length_takes_no_memory() -> None:
    import tracemalloc

    codec = new(FrameRecogniser(), limit=1 << 40)
    tracemalloc.start()
    codec.receive(header(BINARY, 1 << 39) + bytes(1000))
    assert codec.next_event() is None
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < most < 20_000


def test_a_few_bytes_do_not_hold_a_long_read() -> None:
    codec = new(FrameRecogniser())
    codec.receive(frame(BINARY, bytes(60_000)) + frame(BINARY, b"x" * 200)[:5])
    assert codec.next_event() == bytes(60_000)
    assert codec.next_event() is None
    assert codec.pending_bytes == len(codec._pending) == 5


# Unmasking


@pytest.mark.usefixtures("_unmasking")
@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(0, 40) | st.sampled_from([383, 384, 385, 767, 768, 769, 775, 5000, 65539]),
    start=st.integers(0, 20), behind=st.integers(0, 9), key=_masks, seed=st.integers(0, 255),
)  # fmt: skip
def test_unmask(size: int, start: int, behind: int, key: bytes, seed: int) -> None:
    data = bytes((seed + 7 * i) & 255 for i in range(start + size + behind))
    expected = bytes(byte ^ key[i & 3] for i, byte in enumerate(data[start : start + size]))
    assert unmask(data, start, start + size, key) == expected
    assert unmask(bytearray(data), start, start + size, bytearray(key)) == expected


# Sending


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200) | st.binary(max_size=200) | st.sampled_from([65535, 65536, 300_000]).map(bytes))
def test_messages_out_are_those_of_wsproto(message: str | bytes) -> None:
    codec, strict = new(FrameRecogniser()), FrameProtocol(client=False, extensions=[])
    sent = codec.send_text(message) if isinstance(message, str) else codec.send_bytes(message)
    assert b"".join(sent) == strict.send_data(message)


def test_a_frame_is_given_back_in_pieces() -> None:
    """The work of one call is bounded, however long the frame is."""
    whole = frame(TEXT, b"a" * 1_000_000 + b"\xff")
    found = FrameRecogniser().recognise_frame(whole[:14], 0, 1 << 24)
    assert found is not None
    part, size = found
    assert isinstance(part, PartFrame)
    assert part.add(whole, size, len(whole)) is None
    assert not part.plain
    pieces = list(part.give_back())
    assert b"".join(pieces) == whole
    assert max(map(len, pieces)) == 65536
