"""The recogniser against the strict way: it declines or agrees, and there is no list of exceptions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import corpus_reader
from leanserve.errors import RemoteProtocolError
from leanserve.protocol.events import Request
from leanserve.protocol.fastpath import Recogniser
from leanserve.protocol.http1 import Http1Codec
from leanserve.settings import HttpSettings

SETTINGS = HttpSettings()
SMALL = HttpSettings(request_line_bytes=64, header_bytes=256, header_count=4)
PLAIN = (
    b"GET /a/b?c=d HTTP/1.1\r\nHost: a.example:8000\r\nUser-Agent: x (y) z\r\nAccept: */*\r\n"
    b"Cookie: a=b\r\nConnection: keep-alive"
)
HEADS = sorted(
    {
        part
        for case in corpus_reader.load()
        for part in case.raw.split(b"\r\n\r\n")
        if part and len(part) < 9000
    }
    | {PLAIN}
)


def strict(head: bytes, limits: HttpSettings = SETTINGS) -> Request | None:
    """What the codec makes of a head without the recogniser; None when it is refused."""
    codec = Http1Codec(limits)
    codec.receive(head + b"\r\n\r\n")
    try:
        event = codec.next_event()
    except RemoteProtocolError:
        return None
    assert event is None or isinstance(event, Request)
    return event


def agree(head: bytes, limits: HttpSettings = SETTINGS) -> bool:
    """Assert the rule; tell whether the head was recognised."""
    recogniser = Recogniser(limits)
    found = recogniser.recognise_request(head)
    assert found is None or found == strict(head, limits)
    # A second time, when the lines stand in the table.
    assert recogniser.recognise_request(head) == found
    return found is not None


@pytest.mark.parametrize("head", HEADS, ids=range(len(HEADS)))
def test_every_head_of_the_corpus(head: bytes) -> None:
    agree(head)


def test_a_plain_head_is_recognised() -> None:
    recogniser = Recogniser(SETTINGS)
    assert recogniser.recognise_request(PLAIN) == strict(PLAIN)
    assert (recogniser.recognised, recogniser.declined) == (1, 0)
    assert recogniser.recognise_request(PLAIN.replace(b"GET", b"BREW")) is None
    assert (recogniser.recognised, recogniser.declined) == (1, 1)


@pytest.mark.parametrize(
    "line",
    [
        b"Transfer-Encoding: chunked",
        b"Upgrade: websocket",
        b"Expect: 100-continue",
        b"TE: trailers",
        b"Host: b.example",
        b"Connection: upgrade",
        b"Content-Length: 5, 5",
        b"Content-Length: +5",
        b"X: \x01",
        b" folded",
        b"X : y",
        b"X",
    ],
)
def test_what_is_not_plain_is_declined(line: bytes) -> None:
    assert Recogniser(SETTINGS).recognise_request(PLAIN + b"\r\n" + line) is None


def test_secrets_stay_out_of_the_table() -> None:
    recogniser = Recogniser(SETTINGS)
    secret = b"\r\nAuthorization: Bearer abc\r\nX-API-Key: k\r\nProxy-Authorization: p"
    assert recogniser.recognise_request(PLAIN + secret) is not None
    kept = b" ".join(recogniser._lines)
    assert b"Accept" in kept
    assert not any(word in kept for word in (b"Bearer", b"Cookie", b"X-API-Key", b"Proxy-Auth"))


def test_the_table_is_bounded() -> None:
    recogniser = Recogniser(SETTINGS)
    for number in range(2000):
        assert recogniser.recognise_request(PLAIN + b"\r\nX-Request: %d" % number) is not None
    assert len(recogniser._lines) <= 512
    recogniser.recognise_request(PLAIN + b"\r\nX-Long: " + b"a" * 300)
    assert not any(len(line) > 256 for line in recogniser._lines)


@pytest.mark.parametrize("head", [b"GET /%b HTTP/1.1\r\nHost: a" % (b"a" * n) for n in range(40, 60)])
def test_the_limits_are_the_same(head: bytes) -> None:
    agree(head, SMALL)
    agree(head + b"\r\nX: 1" * (len(head) % 6), SMALL)
    agree(head + b"\r\nX: " + b"y" * (4 * len(head)), SMALL)


_PIECES = st.sampled_from(
    [
        *(b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"\x00", b"\x0b", b"\x7f", b"\x85", b"\xff", b",", b"#"),
        *(b"Host: a", b"Content-Length: 3", b"content-length:3", b"Connection: close", b"Connection: ,"),
        *(b"Transfer-Encoding: chunked", b"TE: trailers", b"HTTP/1.0", b"HTTP/1.1", b"%zz", b"*", b"http://a/"),
    ]
)


@st.composite
def mutated_heads(draw: st.DrawFn) -> bytes:
    head = bytearray(draw(st.sampled_from(HEADS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(head)))
        cut = draw(st.integers(0, 3))
        head[at : at + cut] = draw(_PIECES | st.binary(max_size=2))
    return bytes(head)


@settings(max_examples=1500, deadline=None)
@given(mutated_heads())
def test_mutated_heads(head: bytes) -> None:
    if b"\r\n\r\n" not in head and not head.startswith(b"\r\n") and not head.endswith(b"\r"):
        agree(head)
