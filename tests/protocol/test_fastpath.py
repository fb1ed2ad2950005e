"""The recogniser against the strict way: it declines or agrees, and there is no list of exceptions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import corpus_reader
from both_ways import (
    OURS,
    SETTINGS,
    SMALL,
    plain_start,
    planned_response,
    planned_start,
    strict_request,
)
from leanserve.protocol.events import Request
from leanserve.protocol.fastpath import Recogniser, ResponseEncoder
from leanserve.protocol.responses import check_headers
from leanserve.settings import HttpSettings

PLAIN = (
    b"GET /a/b?c=d HTTP/1.1\r\nHost: a.example:8000\r\nUser-Agent: x (y) z\r\nAccept: */*\r\n"
    b"Cookie: a=b\r\nConnection: keep-alive"
)
PUBLIC = PLAIN.replace(b"Cookie: a=b\r\n", b"")
HEADS = sorted(
    {
        part
        for case in corpus_reader.load()
        for part in case.raw.split(b"\r\n\r\n")
        if part and len(part) < 9000
    }
    | {PLAIN}
)


def agree(head: bytes, limits: HttpSettings = SETTINGS) -> bool:
    """Assert the rule; tell whether the head was recognised."""
    recogniser = Recogniser(limits)
    found = recogniser.recognise_request(head)
    assert found is None or found == strict_request(head, limits)
    # Once more when the head is known, and when it stands in the table.
    assert recogniser.recognise_request(head) == found
    assert recogniser.recognise_request(head) == found
    if found is not None:
        taught = teach(head, limits)
        assert taught.recognise_request(head) == found
        assert taught.recognise_request(head.replace(b"/", b"//")) == strict_request(
            head.replace(b"/", b"//"), limits
        )
    return found is not None


def teach(head: bytes, limits: HttpSettings = SETTINGS) -> Recogniser:
    """A recogniser that has seen the names of this plain head, and not its values."""
    recogniser = Recogniser(limits)
    recogniser.learn_shape([line.partition(b":")[0] for line in head.split(b"\r\n")[1:]])
    return recogniser


@pytest.mark.parametrize("head", HEADS, ids=range(len(HEADS)))
def test_every_head_of_the_corpus(head: bytes) -> None:
    agree(head)


def test_a_plain_head_is_recognised() -> None:
    recogniser = Recogniser(SETTINGS)
    assert recogniser.recognise_request(PLAIN) == strict_request(PLAIN)
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


@pytest.mark.parametrize(
    "name", [b"Authorization", b"X-API-Key", b"Proxy-Authorization", b"COOKIE", b"x-csrf-token", b"Referer",
     b"Cf-Access-Jwt-Assertion", b"X-Forwarded-Client-Cert", b"X-Passwd"]
)
def test_secrets_stay_out_of_the_table(name: bytes) -> None:
    recogniser = Recogniser(SETTINGS)
    for _ in range(3):
        assert recogniser.recognise_request(PUBLIC) is not None
        assert recogniser.recognise_request(PUBLIC + b"\r\n" + name + b": abc") is not None
    assert list(recogniser._heads) == [PUBLIC]


@pytest.mark.parametrize(
    "target",
    [
        *(b"/?api_key=1", b"/?TOKEN=1", b"/?X-Amz-Signature=1", b"/?a=b&sig=1", b"/?code=1", b"/?jwt=a"),
        *(b"/?otp=1", b"/?pwd=a", b"/?passwd=a", b"/?ticket=a", b"/?SAMLResponse=a", b"/?%74oken=a"),
        b"/a%20b",
        *(b"/Reset-Password/S3CRET", b"/bot1234567890:AbCdEfGh/getMe", b"/?x=0123456789abcdef0"),
    ],
)
def test_secrets_in_a_target_stay_out_of_the_table(target: bytes) -> None:
    recogniser = Recogniser(SETTINGS)
    for _ in range(3):
        assert recogniser.recognise_request(PUBLIC.replace(b"/a/b?c=d", target)) is not None
    assert not recogniser._heads


@pytest.mark.parametrize("target", [b"/", b"/v1/models/small-2024/infer", b"/hello?name=world"])
def test_other_targets_are_in_the_table(target: bytes) -> None:
    recogniser = Recogniser(SETTINGS)
    for _ in range(3):
        assert recogniser.recognise_request(PUBLIC.replace(b"/a/b?c=d", target)) is not None
    assert len(recogniser._heads) == 1


def test_the_table_is_bounded() -> None:
    recogniser = Recogniser(SETTINGS)
    for number in range(2000):
        for _ in range(2):
            assert recogniser.recognise_request(PUBLIC + b"\r\nX-%d: %d" % (number, number)) is not None
    assert 0 < len(recogniser._heads) <= 256
    assert 0 < len(recogniser._names) <= 512
    assert 0 < len(recogniser._seen) <= 1024
    for _ in range(2):
        recogniser.recognise_request(PUBLIC + b"\r\nX-Long: " + b"a" * 2048)
        recogniser.recognise_request(PUBLIC + b"\r\n" + b"a" * 65 + b": x")
    assert not any(len(name) > 64 for name in recogniser._names)
    assert not any(len(head) > 2048 for head in recogniser._heads)


@pytest.mark.parametrize(
    "line",
    [
        *(b"Accept: */*", b"Accept:  */*", b"Accept: */* ", b"Accept:\t*/*", b"Accept:*/*", b"Accept: "),
        b"Accept:",
        *(b"accept: */*", b"Accept : */*", b"Accept", b"Accept: a\x00b", b"Accept: a\nb", b"Accept: a\rb"),
        *(b"Accept: a\x7fb", b"Accept: a\tb", b"Accept: \xff\x80", b"Accept: a\r\n b", b"Accept: a: b"),
        *(b"Accept: a\r\nX: b", b"Accept: a\r\nContent-Length: 3", b"Accept: a\n", b"Accept: a\r"),
    ],
)
def test_a_shape_reads_values_as_the_strict_way_does(line: bytes) -> None:
    base = PLAIN.replace(b"Accept: */*", b"%b").replace(b"Cookie: a=b", b"Content-Length: %b")
    for length in (b"0", b"5", b"05", b"5,5", b"+5", b" 5", b"1" * 19, b"1" * 20, b""):
        for option in (b"keep-alive", b"close", b"Close", b"close, x", b"upgrade"):
            head = (base % (line, length)).replace(b"keep-alive", option)
            recogniser = teach(base % (b"Accept: x", b"1"))
            found = recogniser.recognise_request(head)
            assert found is None or found == strict_request(head)
    assert teach(PLAIN).recognise_request(base % (line, b"5")) in (None, strict_request(base % (line, b"5")))


def test_shapes_are_learned_and_bounded() -> None:
    recogniser = Recogniser(SETTINGS)
    for number in range(12_800):
        head = PUBLIC + b"\r\nX-%d: %d" % (number // 800, number)
        assert recogniser.recognise_request(head) == strict_request(head)
    assert len(recogniser._shapes) == 8
    for number in range(2000):
        recogniser.recognise_request(PLAIN + b"\r\nX-%d: %d" % (number, number))  # no names come twice
    assert len(recogniser._shapes) == 8
    assert 0 < len(recogniser._looked_at) <= 32


def test_values_of_secrets_are_not_kept_beside_a_shape() -> None:
    recogniser = teach(PLAIN)
    for _ in range(3):
        assert recogniser.recognise_request(PLAIN) == strict_request(PLAIN)
    assert not recogniser._heads


def test_a_head_that_comes_again_is_the_same_request() -> None:
    recogniser = Recogniser(SETTINGS)
    first, second, third, fourth = (recogniser.recognise_request(PUBLIC) for _ in range(4))
    assert first == second == strict_request(PUBLIC)
    assert first is not second is third is fourth
    assert recogniser.recognise_request(PUBLIC + b"\r\nX: y") == strict_request(PUBLIC + b"\r\nX: y")


@pytest.mark.parametrize("head", [b"GET /%b HTTP/1.1\r\nHost: a" % (b"a" * n) for n in range(40, 60)])
def test_the_limits_are_the_same(head: bytes) -> None:
    agree(head, SMALL)
    agree(head + b"\r\nX: 1" * (len(head) % 6), SMALL)
    agree(head + b"\r\nX: " + b"y" * (4 * len(head)), SMALL)


_PIECES = st.sampled_from(
    [
        *(b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"\x00", b"\x0b", b"\x7f", b"\x85", b"\xff", b",", b"#"),
        *(b"Host: a", b"Content-Length: 3", b"content-length:3", b"Connection: close", b"Connection: ,"),
        *(
            b"Transfer-Encoding: chunked",
            b"TE: trailers",
            b"HTTP/1.0",
            b"HTTP/1.1",
            b"%zz",
            b"*",
            b"http://a/",
        ),
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


@settings(max_examples=1500, deadline=None)
@given(st.sampled_from(HEADS), mutated_heads())
def test_heads_with_the_shape_of_another(taught: bytes, head: bytes) -> None:
    if Recogniser(SETTINGS).recognise_request(taught) is None or not head.startswith(b"GET "):
        taught = PLAIN
    for other in (head, taught[: len(taught) // 2] + head[len(head) // 2 :]):
        if b"\r\n\r\n" not in other and not other.startswith(b"\r\n") and not other.endswith(b"\r"):
            found = teach(taught).recognise_request(other)
            assert found is None or found == strict_request(other)


# Responses


def responses_agree(request: Request, status: int, headers: Any, body: bytes, *, close: bool) -> bool:
    """Assert the rule; tell whether the response was plain."""
    encoder = ResponseEncoder(name for name, _ in OURS)
    for _ in range(2):  # a second time, when the lines stand in the table
        plain = encoder.check(headers)
        found = None
        if plain is not None:
            assert plain[2] == check_headers(headers)
            found = encoder.encode(request, status, plain, body, OURS, close)
        assert found is None or found == planned_response(request, status, headers, body, close=close)
        if plain is not None:
            start = plain_start(encoder, request, status, plain, close=close)
            assert start is None or start == planned_start(request, status, headers, close=close)
            assert start is not None or found is None, "what is plain as a whole is plain in pieces"
    return found is not None


GET = Request(b"GET", b"/", b"", "1.1", [(b"host", b"a")])


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"content-type", b"text/plain"), (b"content-length", b"5")],
        [(b"content-length", b"005"), (b"set-cookie", b"a=b"), (b"set-cookie", b"c=d")],
        ((b"x-a", b"1"), (b"x-a", b"\xff \t z")),
    ],
)
def test_plain_responses_are_encoded(headers: Any, close: bool) -> None:
    assert responses_agree(GET, 200, headers, b"hello", close=close)
    assert responses_agree(GET, 500, headers, b"hello", close=close)


@pytest.mark.parametrize(
    "headers",
    [
        [(b"Content-Type", b"text/plain")],
        [(b"content-length", b"4")],
        [(b"content-length", b"5"), (b"content-length", b"5")],
        [(b"content-length", b" 5")],
        [(b"content-length", "5")],
        [(b"connection", b"close")],
        [(b"transfer-encoding", b"chunked")],
        [(b"date", b"now")],
        [(b"server", b"y")],
        [(b"x-own", b"2")],
        [(b"x-a", b" 1")],
        [(b"x-a", b"")],
        [(b"x-a", b"1\r\nx-b: 2")],
        [(b"x-a", b"1\x00")],
        [(b"x a", b"1")],
        [("x-a", b"1")],
        [(b"x-a", "1")],
        [(b"x-a", bytearray(b"1"))],
        [[b"x-a", b"1"]],
        [(b"x-a",)],
        [None],
        None,
        iter([(b"x-a", b"1")]),
        {b"x-a": b"1"},
    ],
)
def test_what_is_not_plain_in_a_response_is_declined(headers: Any) -> None:
    encoder = ResponseEncoder(name for name, _ in OURS)
    plain = encoder.check(headers)
    assert plain is None or encoder.encode(GET, 200, plain, b"hello", OURS, False) is None


@pytest.mark.parametrize("status", [204, 205, 304, 299, 999])
def test_a_status_with_rules_of_its_own_is_declined(status: int) -> None:
    assert not responses_agree(GET, status, [], b"hello", close=False)
    encoder = ResponseEncoder(())
    plain = encoder.check([])
    assert plain is not None
    assert encoder.encode_start(GET, status, plain, OURS, False) is None


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize(
    "headers", [[], [(b"content-type", b"text/event-stream")], [(b"content-length", b"07")]]
)
def test_heads_of_plain_responses_in_pieces_are_encoded(headers: Any, close: bool) -> None:
    encoder = ResponseEncoder(name for name, _ in OURS)
    plain = encoder.check(headers)
    assert plain is not None
    start = plain_start(encoder, GET, 200, plain, close=close)
    assert start is not None
    assert start == planned_start(GET, 200, headers, close=close)


@pytest.mark.parametrize("request_", [replace(GET, method=b"HEAD"), replace(GET, version="1.0")])
def test_a_request_with_rules_of_its_own_is_declined(request_: Request) -> None:
    assert not responses_agree(request_, 200, [], b"hello", close=False)


def test_the_lines_are_bounded_and_hold_no_secret() -> None:
    encoder = ResponseEncoder(())
    for number in range(2000):
        mine = [(b"set-cookie", b"id=%d" % number), (b"location", b"/?token=%d" % number), (b"x-a", b"b")]
        assert encoder.check([(b"vary", b"x-%d" % number), *mine])
    assert encoder.check([(b"vary", b"a" * 300)])
    assert 0 < len(encoder._lines) <= 512
    assert {name for name, _ in encoder._lines} == {b"vary"}
    assert not any(len(line) > 256 for line in encoder._lines.values())


_NAMES = st.sampled_from(
    [
        *(b"content-type", b"content-length", b"Content-Length", b"connection", b"transfer-encoding"),
        *(b"date", b"server", b"set-cookie", b"x-own", b"x-a", b"X-B", b"trailer", b"a b", b""),
    ]
)
_VALUES = st.sampled_from(
    [b"", b"0", b"5", b"05", b"5,5", b"close", b"chunked", b"a b", b" a", b"a\t", b"\xe9"]
)


@settings(max_examples=1500, deadline=None)
@given(
    st.lists(st.tuples(_NAMES, _VALUES | st.binary(max_size=4)), max_size=4),
    st.sampled_from([200, 201, 204, 205, 206, 299, 304, 404, 500, 999]),
    st.sampled_from([b"", b"hello", b"x" * 70000]),
    st.sampled_from(
        [GET, replace(GET, method=b"HEAD"), replace(GET, version="1.0"), replace(GET, method=b"PUT")]
    ),
    st.booleans(),
)
def test_any_response(headers: Any, status: int, body: bytes, request_: Request, close: bool) -> None:
    responses_agree(request_, status, headers, body, close=close)
