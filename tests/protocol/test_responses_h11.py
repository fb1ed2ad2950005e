"""Our responses beside h11's: the same lines and the same body for whatever an application may say."""

from __future__ import annotations

import h11
from hypothesis import given, settings
from hypothesis import strategies as st

from leanserve.errors import AppProtocolError
from leanserve.protocol.events import Headers
from leanserve.protocol.http1 import Http1Codec
from leanserve.protocol.responses import check_headers
from leanserve.settings import HttpSettings

DEFAULTS = [(b"date", b"now"), (b"server", b"s")]


def ours(head: bytes, status: int, headers: Headers, body: list[bytes], close: bool) -> bytes | None:
    """What the codec sends; None when it refuses to."""
    codec = Http1Codec(HttpSettings())
    codec.receive(head + b"\r\n\r\n")
    while codec.next_event() is not None:
        pass
    try:
        checked = check_headers(headers)
        first, *rest = body
        out = codec.encode_response(status, checked, DEFAULTS, first, more=bool(rest), close=close)
    except AppProtocolError:
        return None
    while rest:
        out += codec.encode_body(rest.pop(0), more=bool(rest))
    assert codec.response is not None
    return None if codec.response.fault else out


def theirs(head: bytes, status: int, headers: Headers, body: list[bytes], close: bool) -> bytes | None:
    """What h11 sends for the same, told of lengths and options that are the server's to choose."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(head + b"\r\n\r\n")
    while connection.next_event() not in (h11.NEED_DATA, h11.PAUSED):
        pass
    names = {name.lower() for name, _ in headers}
    told = headers + [item for item in DEFAULTS if item[0] not in names]
    bodyless = head.startswith(b"HEAD") or status in (204, 205, 304)
    if status == 205:
        told = [*told, (b"content-length", b"0")]
    elif len(body) == 1 and not bodyless and b"content-length" not in names:
        told = [*told, (b"content-length", b"%d" % len(body[0]))]
    if close:
        told = [*told, (b"connection", b"close")]
    try:
        out = connection.send(h11.Response(status_code=status, headers=told, reason=_reason(status)))
        for piece in [] if bodyless else body:
            out += connection.send(h11.Data(data=piece))
        return out + connection.send(h11.EndOfMessage())
    except h11.LocalProtocolError:
        return None


def _reason(status: int) -> bytes:
    return h11.Response(status_code=status, headers=[]).reason or _PHRASES.get(status, b"")


_PHRASES = {200: b"OK", 204: b"No Content", 205: b"Reset Content", 304: b"Not Modified", 404: b"Not Found"}


def _parts(answer: bytes | None) -> tuple[list[bytes], bytes] | None:
    """Head lines and body. h11 writes its own framing fields with capitals and last, and the order of fields
    with different names "is not significant" (RFC 9110 section 5.3)."""
    if answer is None:
        return None
    head, _, body = answer.partition(b"\r\n\r\n")
    return sorted(head.lower().split(b"\r\n")), body


def _told(answer: bytes | None, head: bytes) -> bytes | None:
    """h11 says "chunked" in an answer to HEAD, which RFC 9112 section 6.1 lets a server do; we do not."""
    if answer is None or not head.startswith(b"HEAD"):
        return answer
    return answer.replace(b"\r\nTransfer-Encoding: chunked", b"")


_NAMES = st.sampled_from([b"content-type", b"X-A", b"set-cookie", b"date", b"vary", b"bad name", b""])
_VALUES = st.sampled_from([b"", b"a", b"a b", b"text/html; charset=utf-8", b"\xe9", b"a\tb", b"a\nb"])
_LENGTHS = st.sampled_from([[], [(b"content-length", b"3")], [(b"Content-Length", b"0")]])
_HEADS = [
    b"GET / HTTP/1.1\r\nHost: a",
    b"HEAD / HTTP/1.1\r\nHost: a",
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close",
    b"GET / HTTP/1.0",
]


@settings(max_examples=800, deadline=None)
@given(
    head=st.sampled_from(_HEADS),
    status=st.sampled_from([200, 204, 205, 304, 404]),
    headers=st.lists(st.tuples(_NAMES, _VALUES), max_size=3),
    length=_LENGTHS,
    body=st.lists(st.sampled_from([b"", b"abc", b"x" * 300]), min_size=1, max_size=3),
    close=st.booleans(),
)
def test_the_same_as_h11(
    head: bytes, status: int, headers: Headers, length: Headers, body: list[bytes], close: bool
) -> None:
    if status in (204, 205) and length:
        return  # h11 sends on the length that RFC 9110 section 8.6 forbids there; test_responses has the rule
    mine = ours(head, status, headers + length, body, close)
    reference = theirs(head, status, headers + length, body, close)
    assert _parts(mine) == _parts(_told(reference, head))


def test_what_h11_reads_is_what_was_sent() -> None:
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(ours(b"GET / HTTP/1.1\r\nHost: a", 200, [], [b"abc", b"de", b""], False) or b"")
    got = [client.next_event() for _ in range(4)]
    assert isinstance(got[0], h11.Response)
    assert [bytes(event.data) for event in got[1:3]] == [b"abc", b"de"]
    assert isinstance(got[3], h11.EndOfMessage)
