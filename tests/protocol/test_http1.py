"""leanserve.protocol.http1: bytes to events and back, the same at every cut and in both modes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leanserve.errors import AppProtocolError, RemoteProtocolError
from leanserve.protocol.events import Data, EndOfBody, Request
from leanserve.protocol.fastpath import Recogniser
from leanserve.protocol.http1 import FileRange, Http1Codec
from leanserve.protocol.responses import check_headers
from leanserve.settings import HttpSettings
from wire import parse

SETTINGS = HttpSettings()
GET = b"GET /a?b=c HTTP/1.1\r\nHost: a\r\nX-Y: z\r\n\r\n"
POST = b"POST /p HTTP/1.1\r\nhost: a\r\ncontent-length: 11\r\n\r\nhello world"
CHUNKED = (
    b"PUT /c HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nx-t: 1\r\n\r\n"
)
ABSOLUTE = b"GET http://b.example/q HTTP/1.1\r\nhost: other\r\n\r\n"
KEPT = b"GET /k HTTP/1.0\r\nconnection: keep-alive\r\n\r\n"
LOOKS_LIKE = b"POST /l HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%b" % (len(GET), GET)
STREAM = [GET, POST, CHUNKED, ABSOLUTE, b"\r\n" + GET, LOOKS_LIKE, KEPT, GET]


@pytest.fixture(params=[True, False], ids=["fast", "h11"])
def fast(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def new(fast: bool = True, settings: HttpSettings = SETTINGS) -> Http1Codec:
    return Http1Codec(settings, Recogniser(settings) if fast else None)


def read(codec: Http1Codec, pieces: Iterable[bytes]) -> list[Any]:
    """Events, with the data of one request joined, and the answers given at once."""
    events: list[Any] = []
    for piece in pieces:
        codec.receive(piece)
        while (event := codec.next_event()) is not None:
            if isinstance(event, Data) and events and isinstance(events[-1], Data):
                events[-1] = Data(events[-1].data + event.data)
            else:
                events.append(event)
            if codec.request_ended:
                codec.encode_response(200, [], [], b"ok", more=False, close=False)
                codec.next_exchange()
    return events


def flat(events: list[Any]) -> list[Any]:
    return [
        (event.method, event.raw_path, event.query, event.version, event.headers, event.keep_alive)
        if isinstance(event, Request)
        else event
        for event in events
    ]


# Reading


def test_a_stream_of_requests(fast: bool) -> None:
    events = flat(read(new(fast), STREAM))
    assert events[:1] == [
        (b"GET", b"/a", b"b=c", "1.1", [(b"host", b"a"), (b"x-y", b"z")], True),
    ]
    assert events[2:4] == [Data(b"hello world"), EndOfBody()]
    assert events[5:7] == [Data(b"hello world"), EndOfBody()]
    assert events[7][:5] == (b"GET", b"/q", b"", "1.1", [(b"host", b"b.example")])
    assert events[10] == Data(GET)
    assert [event[1] for event in events if isinstance(event, tuple)] == [
        b"/a", b"/p", b"/c", b"/q", b"/a", b"/l", b"/k", b"/a",
    ]  # fmt: skip


def test_every_cut_gives_the_same_events(fast: bool) -> None:
    whole = b"".join(STREAM)
    wanted = flat(read(new(fast), [whole]))
    assert wanted == flat(read(new(not fast), STREAM))
    for at in range(len(whole) + 1):
        assert flat(read(new(fast), [whole[:at], whole[at:]])) == wanted, at
    assert flat(read(new(fast), [bytes([byte]) for byte in whole])) == wanted


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(STREAM), max_size=6), st.lists(st.integers(0, 600), max_size=8), st.booleans()
)
def test_any_cuts_give_the_same_events(requests: list[bytes], cuts: list[int], fast: bool) -> None:
    whole = b"".join(requests)
    edges = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    pieces = [whole[start:end] for start, end in itertools.pairwise(edges)]
    assert flat(read(new(fast), pieces)) == flat(read(new(not fast), [whole]))


def test_nothing_behind_a_message_is_looked_at(fast: bool) -> None:
    codec = new(fast)
    codec.receive(GET + b"\x00junk\r\n\r\n")
    assert isinstance(codec.next_event(), Request)
    assert codec.next_event() is None
    assert codec.request_ended
    assert len(codec.buffer) == len(b"\x00junk\r\n\r\n")
    codec.encode_response(200, [], [], b"", more=False, close=False)
    codec.next_exchange()
    assert not codec.request_ended
    with pytest.raises(RemoteProtocolError):
        codec.next_event()


@pytest.mark.parametrize(
    "pieces", [[b"\r\n", GET], [b"\r", b"\n", GET], [b"\r", b"\n" + GET], [b"\r\n" + GET]]
)
def test_one_leading_empty_line_is_ignored(fast: bool, pieces: list[bytes]) -> None:
    assert len(read(new(fast), pieces)) == 1


@pytest.mark.parametrize(
    "pieces", [[b"\r\n\r\n" + GET], [b"\r\n", b"\r\n" + GET], [b"\r\n", b"\r", b"\n" + GET]]
)
def test_and_not_two(fast: bool, pieces: list[bytes]) -> None:
    with pytest.raises(RemoteProtocolError):
        read(new(fast), pieces)


def test_each_request_may_have_its_empty_line(fast: bool) -> None:
    assert len(read(new(fast), [b"\r\n" + GET, b"\r\n", GET])) == 2


def test_the_rest_is_another_protocols(fast: bool) -> None:
    codec = new(fast)
    codec.receive(GET + b"\x81\x00")
    codec.next_event()
    codec.next_event()
    assert codec.take_rest() == b"\x81\x00"
    assert len(codec.buffer) == 0


@pytest.mark.parametrize("body", [b"zz\r\n", b"5\r\nhelloX\r\n", b"5\r\nhello\r\n0\r\nbad line\r\n\r\n"])
def test_a_chunked_body_that_goes_wrong(fast: bool, body: bytes) -> None:
    codec = new(fast)
    with pytest.raises(RemoteProtocolError) as caught:
        read(codec, [b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n" + body])
    assert caught.value.status == 400
    assert codec.request is not None


LIMITED = HttpSettings(max_body_size=11)


@pytest.mark.parametrize("request_", [POST, CHUNKED], ids=["length", "chunked"])
def test_a_body_of_just_the_limit_passes(fast: bool, request_: bytes) -> None:
    assert flat(read(new(fast, LIMITED), [request_])) == flat(read(new(fast), [request_]))


@pytest.mark.parametrize("request_", [POST, CHUNKED], ids=["length", "chunked"])
def test_a_body_over_the_limit_is_refused_at_every_cut(fast: bool, request_: bytes) -> None:
    settings = HttpSettings(max_body_size=10)
    for at in range(len(request_)):
        codec = new(fast, settings)
        with pytest.raises(RemoteProtocolError, match="max_body_size") as caught:
            read(codec, [request_[:at], request_[at:]])
        assert caught.value.status == 413


def test_an_announced_body_over_the_limit_is_refused_with_the_head(fast: bool) -> None:
    """Before the first byte of it is here, and before the request is an event."""
    codec = new(fast, LIMITED)
    codec.receive(b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 12\r\n\r\n")
    with pytest.raises(RemoteProtocolError) as caught:
        codec.next_event()
    assert caught.value.status == 413


def test_a_chunk_over_the_limit_is_refused_with_its_size_line(fast: bool) -> None:
    codec = new(fast, LIMITED)
    codec.receive(b"PUT / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nb\r\nhello world\r\n")
    assert isinstance(codec.next_event(), Request)
    assert codec.next_event() == Data(b"hello world")
    codec.receive(b"1\r")
    assert codec.next_event() is None
    codec.receive(b"\n")
    with pytest.raises(RemoteProtocolError) as caught:
        codec.next_event()
    assert caught.value.status == 413


def test_a_head_byte_by_byte_is_not_searched_anew(fast: bool) -> None:
    import time

    head = b"GET / HTTP/1.1\r\nhost: a\r\n" + b"x: " + b"y" * 60_000
    codec = new(fast)
    begin = time.process_time()
    for at in range(len(head)):
        codec.receive(head[at : at + 1])
        assert codec.next_event() is None
    assert time.process_time() - begin < 2


# Answering


def begun(fast: bool, request: bytes = GET) -> Http1Codec:
    codec = new(fast)
    codec.receive(request)
    while codec.next_event() is not None:
        pass
    return codec


REQUESTS = [
    GET, GET.replace(b"GET", b"HEAD"), KEPT, b"GET / HTTP/1.0\r\n\r\n",
    GET.replace(b"X-Y: z", b"te: trailers"), GET.replace(b"X-Y: z", b"connection: close"), ABSOLUTE,
]  # fmt: skip
HEADERS = [
    [], [(b"content-length", b"4")], [(b"connection", b"close")],
    [(b"X-A", b" b\xe9 "), (b"set-cookie", b"1")], [(b"transfer-encoding", b"chunked")],
    [(b"connection", b"foo")],
]  # fmt: skip


@settings(deadline=None)
@given(
    st.sampled_from(REQUESTS), st.sampled_from([200, 204, 205, 304, 404, 500, 599]), st.sampled_from(HEADERS),
    st.lists(st.binary(max_size=6), min_size=1, max_size=4), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_whatever_is_answered_can_be_read(
    request: bytes, status: int, headers: Any, bodies: list[bytes], close: bool, trailers: bool, fast: bool
) -> None:
    codec = begun(fast, request)
    first, *rest = bodies
    data = codec.encode_response(
        status,
        check_headers(headers),
        [(b"server", b"s")],
        first,
        more=bool(rest),
        close=close,
        trailers=trailers,
    )
    for number, piece in enumerate(rest, 2):
        data += codec.encode_body(piece, more=number < len(bodies) or trailers)
    if trailers:
        data += codec.encode_trailers([(b"x-t", b"1")])
    head = codec.response
    assert head is not None
    (response,) = parse(data, [request.partition(b" ")[0]], ended=True)
    whole = b"".join(bodies)
    assert response.status == status
    assert response.closes is head.close
    assert response.complete or head.fault is not None
    if request.startswith(b"HEAD") or status in (204, 205, 304):
        assert response.body == b""
    elif headers == HEADERS[1]:
        assert response.body == whole[:4]
        assert (head.fault is None) is (len(whole) == 4)
    else:
        assert response.body == whole
    if response.trailers:
        assert b"te: trailers" in request
    if close or b"close" in request or headers == HEADERS[2] or request == REQUESTS[3]:
        assert head.close


def test_nothing_is_encoded_of_a_wrong_head(fast: bool) -> None:
    codec = begun(fast)
    for status, headers in (
        (99, []),
        (200, [(b"content-length", b"x")]),
        (200, [(b"transfer-encoding", b"x")]),
    ):
        with pytest.raises(AppProtocolError):
            codec.encode_response(status, headers, [], b"", more=False, close=False)
        assert codec.response is None
    data = codec.encode_response(500, [], [], b"oops", more=False, close=False)
    assert parse(data, [b"GET"])[0].body == b"oops"


def test_an_empty_piece_is_not_the_end(fast: bool) -> None:
    codec = begun(fast)
    data = codec.encode_response(200, [], [], b"", more=True, close=False)
    data += codec.encode_body(b"", more=True)
    assert not parse(data, [b"GET"])[0].complete
    data += codec.encode_body(b"", more=False)
    assert parse(data, [b"GET"])[0].complete


@pytest.mark.parametrize(
    ("declared", "size", "sent", "fault"),
    [(5, 5, 5, False), (5, 9, 5, True), (5, 3, 3, True), (0, 0, 0, False)],
)
def test_files(fast: bool, declared: int, size: int, sent: int, fault: bool) -> None:
    codec = begun(fast)
    codec.encode_response(200, [(b"content-length", b"%d" % declared)], [], b"", more=True, close=False)
    pieces = codec.encode_file(size)
    assert sum(piece.count for piece in pieces if isinstance(piece, FileRange)) == sent
    assert codec.response is not None
    assert (codec.response.fault is not None) is fault


def test_no_file_in_an_answer_to_head(fast: bool) -> None:
    codec = begun(fast, GET.replace(b"GET", b"HEAD"))
    codec.encode_response(200, [(b"content-length", b"5")], [], b"", more=True, close=False)
    assert codec.encode_file(5) == []
    assert codec.response is not None
    assert codec.response.fault is None
