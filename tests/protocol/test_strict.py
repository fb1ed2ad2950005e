"""leanserve.protocol.strict: what h11 would take and we refuse. The corpus has the inputs; here are rules."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanserve.errors import RemoteProtocolError
from leanserve.protocol.events import BodyKind, Headers, Request, Upgrade
from leanserve.protocol.fastpath import Recogniser
from leanserve.protocol.strict import ChunkGate, build_request, check_head, check_partial_head, split_list
from leanserve.settings import HttpSettings

SETTINGS = HttpSettings()
SMALL = HttpSettings(request_line_bytes=64, header_bytes=256, header_count=3)
HEAD = b"GET /a?b HTTP/1.1\r\nHost: a.example\r\nX-A: b\tc\xe9"


def status_of(head: bytes, settings: HttpSettings = SETTINGS) -> int | None:
    try:
        check_head(head, settings)
    except RemoteProtocolError as error:
        return error.status
    return None


def request(
    *headers: tuple[bytes, bytes], method: bytes = b"GET", target: bytes = b"/", version: bytes = b"1.1"
) -> Request:
    host: Headers = [] if any(name == b"host" for name, _ in headers) else [(b"host", b"a")]
    return build_request(method, target, version, [*host, *headers])


# Heads


def test_a_plain_head_passes() -> None:
    assert status_of(HEAD) is None


@given(st.binary(min_size=1, max_size=1), st.integers(0, len(HEAD)))
def test_a_control_byte_anywhere_is_refused(byte: bytes, at: int) -> None:
    status = status_of(HEAD[:at] + byte + HEAD[at:])
    if (byte[0] < 0x20 and byte != b"\t") or byte[0] == 0x7F:
        assert status == 400


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1", None),
        (b"GET / HTTP/1.0\r\na:b", None),
        (b"GET / HTTP/2.0", 505),
        (b"GET / HTTP/1.2", 505),
        (b"GET / HTTP/0.9", 505),
        (b"GET / HTTP/11.1", 400),
        (b"GET / http/1.1", 400),
        (b"GET  / HTTP/1.1", 400),
        (b"GET /", 400),
        (b"PRI * HTTP/2.0", 505),
        (b"CONNECT a:443 HTTP/1.1", 501),
        (b"GET /\xff HTTP/1.1", 400),
        (b"G[T / HTTP/1.1", 400),
        (b"GET / HTTP/1.1\r\na : b", 400),
        (b"GET / HTTP/1.1\r\n a: b", 400),
        (b"GET / HTTP/1.1\r\na: b\r\n c", 400),
        (b"GET / HTTP/1.1\r\na: b\nc: d", 400),
        (b"GET / HTTP/1.1\r\na: b\rc: d", 400),
        (b"GET / HTTP/1.1\r\n: b", 400),
        (b"GET / HTTP/1.1\r\na", 400),
        (b"GET / HTTP/1.1\r\ncontent-length: 5\r\nContent-Length: 5", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 5, 5", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: +5", 400),
        (b"GET / HTTP/1.1\r\nContent-Length:", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 1" + b"0" * 19, 400),
        (b"GET / HTTP/1.1\r\nContent-Length: \t5 ", None),
    ],
)
def test_verdicts(head: bytes, status: int | None) -> None:
    assert status_of(head) == status


def test_limits_are_exact() -> None:
    line = b"GET /" + b"a" * (64 - 14) + b" HTTP/1.1"
    assert len(line) == 64
    assert status_of(line, SMALL) is None
    assert status_of(line.replace(b"/a", b"/aa"), SMALL) == 414
    block = b"a: " + b"b" * 253
    assert status_of(b"GET / HTTP/1.1\r\n" + block, SMALL) is None
    assert status_of(b"GET / HTTP/1.1\r\n" + block + b"b", SMALL) == 431
    lines = b"\r\na: b" * 3
    assert status_of(b"GET / HTTP/1.1" + lines, SMALL) is None
    assert status_of(b"GET / HTTP/1.1" + lines + b"\r\na: b", SMALL) == 431


# Heads that are not complete


def partial(data: bytes, settings: HttpSettings = SETTINGS) -> int | None:
    try:
        check_partial_head(bytearray(data), settings)
    except RemoteProtocolError as error:
        return error.status
    return None


@pytest.mark.parametrize("at", range(len(HEAD) + 3))
def test_the_start_of_a_good_head_waits(at: int) -> None:
    assert partial((HEAD + b"\r\n\r")[:at]) is None


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01", 400),  # TLS on a plain port
        (b" GET", 400),
        (b"\n", 400),
        (b"\r\r", 400),
        (b"GET / HTTP/1.1\n", 400),
        (b"GET / HTTP/1.1\r\na: b\n", 400),
    ],
)
def test_what_can_only_become_wrong_is_refused_at_once(data: bytes, status: int) -> None:
    assert partial(data) == status


def test_a_head_without_end_is_bounded() -> None:
    assert partial(b"G" * 66, SMALL) == 414
    assert partial(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 100, SMALL) == 431


def test_what_waits_is_within_the_limits_of_what_passes() -> None:
    """No cut may refuse what passes in one piece: a line and a block that are exactly as long as allowed."""
    line = b"GET /" + b"a" * (64 - 14) + b" HTTP/1.1"
    whole = line + b"\r\na: " + b"b" * 253 + b"\r\n\r\n"
    assert status_of(whole[:-4], SMALL) is None
    for at in range(len(whole)):
        assert partial(whole[:at], SMALL) is None, at


# Requests


def test_targets() -> None:
    plain = request(target=b"/a%20b?c=%3F?d")
    assert (plain.raw_path, plain.query) == (b"/a%20b", b"c=%3F?d")
    assert request(target=b"*", method=b"OPTIONS").raw_path == b"*"
    assert request(target=b"http://b:81", method=b"OPTIONS").raw_path == b"*"
    assert request(target=b"HTTP://b").raw_path == b"/"
    assert (request(target=b"http://b?x").raw_path, request(target=b"http://b?x").query) == (b"/", b"x")


@pytest.mark.parametrize(
    "target",
    [
        b"a",
        b"?a",
        b"/a#b",
        b"*",
        b"ftp://a/",
        b"http://",
        b"http:///a",
        b"http://u@a/",
        b"http://a:b/",
        b"a:80",
    ],
)
def test_targets_that_are_none(target: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        request(target=target)
    assert caught.value.status == 400


def test_absolute_form_replaces_host() -> None:
    """RFC 9112 section 3.2.2."""
    seen = request((b"host", b"other"), (b"x", b"y"), target=b"http://b.example:81/p")
    assert seen.headers == [(b"host", b"b.example:81"), (b"x", b"y")]
    assert seen.raw_path == b"/p"
    old = request((b"x", b"y"), target=b"http://b/", version=b"1.0")
    assert (b"host", b"b") in old.headers


def test_host_is_demanded_once() -> None:
    with pytest.raises(RemoteProtocolError):
        build_request(b"GET", b"/", b"1.1", [])
    assert build_request(b"GET", b"/", b"1.0", []).headers == []
    with pytest.raises(RemoteProtocolError):
        build_request(b"GET", b"/", b"1.1", [(b"host", b"a"), (b"host", b"a")])


@pytest.mark.parametrize(
    "host", [b"", b"a", b"a:80", b"a:", b"[::1]:80", b"127.0.0.1", b"a_b", b"%41", b"[v1.x]"]
)
def test_hosts(host: bytes) -> None:
    assert request((b"host", host)).headers == [(b"host", host)]


@pytest.mark.parametrize(
    "host", [b"a b", b"a/b", b"a@b", b"a?", b"a:x", b"::1", b"[::1", b"a:123456", b"\xe9"]
)
def test_hosts_that_are_none(host: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        request((b"host", host))


def test_body_framing() -> None:
    assert request().body is BodyKind.NONE
    assert request((b"content-length", b"0")).body is BodyKind.NONE
    five = request((b"content-length", b"005"))
    assert (five.body, five.content_length) == (BodyKind.LENGTH, 5)
    chunked = request((b"transfer-encoding", b"CHUNKED"))
    assert (chunked.body, chunked.content_length) == (BodyKind.CHUNKED, None)


@pytest.mark.parametrize(
    ("headers", "version", "status"),
    [
        ([(b"transfer-encoding", b"chunked"), (b"content-length", b"5")], b"1.1", 400),
        ([(b"transfer-encoding", b"chunked")], b"1.0", 400),
        ([(b"transfer-encoding", b"gzip, chunked")], b"1.1", 501),
        ([(b"transfer-encoding", b"chunked, chunked")], b"1.1", 400),
        ([(b"transfer-encoding", b"chunked"), (b"transfer-encoding", b"chunked")], b"1.1", 400),
        ([(b"transfer-encoding", b"")], b"1.1", 400),
    ],
)
def test_framing_that_smuggles(headers: Headers, version: bytes, status: int) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        request(*headers, version=version)
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("version", "connection", "keep"),
    [
        (b"1.1", [], True),
        (b"1.1", [b"close"], False),
        (b"1.1", [b"Keep-Alive, CLOSE"], False),
        (b"1.1", [b"x", b"close"], False),
        (b"1.1", [b"closed"], True),
        (b"1.0", [], False),
        (b"1.0", [b"keep-alive"], True),
        (b"1.0", [b"keep-alive, close"], False),
        (b"1.0", [b"closed"], False),
    ],
)
def test_keep_alive(version: bytes, connection: list[bytes], keep: bool) -> None:
    assert request(*((b"connection", value) for value in connection), version=version).keep_alive is keep


def test_expect_te_and_upgrade() -> None:
    body = (b"content-length", b"1")
    assert request((b"expect", b"100-Continue"), body).expects_continue
    assert not request((b"expect", b"100-continue")).expects_continue
    assert not request((b"expect", b"100-continue"), body, version=b"1.0").expects_continue
    assert request((b"te", b"gzip, Trailers")).accepts_trailers
    assert not request((b"te", b"gzip")).accepts_trailers
    upgrade = [(b"upgrade", b"WebSocket"), (b"connection", b"keep-alive, Upgrade")]
    assert request(*upgrade).upgrade is Upgrade.WEBSOCKET
    assert request(*upgrade, method=b"POST").upgrade is Upgrade.NONE
    assert request(*upgrade, version=b"1.0").upgrade is Upgrade.NONE
    assert request(upgrade[0]).upgrade is Upgrade.NONE
    assert request((b"upgrade", b"h2c"), upgrade[1]).upgrade is Upgrade.NONE


def test_split_list() -> None:
    assert split_list(b" A,, b\t,c ") == [b"a", b"b", b"c"]
    assert split_list(b"") == []


# Chunks


def gate(data: bytes, pieces: list[int] | None = None, limit: int = 8192) -> tuple[int, bool]:
    """(bytes taken, ended), with `data` cut at the positions of `pieces`."""
    it, taken = ChunkGate(HttpSettings(trailer_bytes=limit)), 0
    for start, end in zip([0, *(pieces or [])], [*(pieces or []), len(data)], strict=True):
        at = start
        while at < end and not it.ended:
            at += it.take(data[at:end])
        taken += at - start
    return taken, it.ended


BODY = b"5;a=b\r\nhello\r\nA\r\n0123456789\r\n0\r\nx-t: 1\r\n\r\n"


def test_it_knows_the_end_at_every_cut() -> None:
    for at in range(len(BODY)):
        assert gate(BODY + b"GET / HTTP/1.1", [at]) == (len(BODY), True), at
        assert gate(BODY[:at]) == (at, False)


@given(st.lists(st.integers(0, len(BODY)), max_size=10))
def test_it_knows_the_end_in_any_pieces(cuts: list[int]) -> None:
    assert gate(BODY, sorted(cuts)) == (len(BODY), True)


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n", b"g\r\n", b"0x5\r\n", b"+5\r\n", b"-1\r\n", b" 5\r\n", b"5 x\r\n", b"5\n", b"5_0\r\n",
        b"1" * 16 + b"\r\n", b"5;a\x00\r\n", b"5\r\nhelloX\r\n", b"5\r\nhello\n", b"5\r\nhello\rX\n",
        b"0\r\nx: 1\n", b"0\r\n x: 1\r\n", b"0\r\nx : 1\r\n", b"0\r\nx: \x00\r\n", b"0\r\nx\r\n",
    ],
)  # fmt: skip
def test_malformed_chunks(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as whole:
        gate(data)
    assert whole.value.status in (400, 431)
    for at in range(len(data)):
        with pytest.raises(RemoteProtocolError):
            gate(data, [at])


@pytest.mark.parametrize(
    "data",
    [
        b"0\r\n" + b"x: 1\r\n" * 20,
        b"0\r\nx: " + b"1" * 200,
        b"5;" + b"a" * 5000,
        (b"1;" + b"a" * 4000 + b"\r\nx\r\n") * 5,
    ],
)
def test_trailers_and_extensions_are_bounded(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        gate(data, limit=100)
    assert caught.value.status in (400, 431)


def test_the_trailers_are_counted() -> None:
    lines = b"x:\r\n" * 128
    assert gate(b"0\r\n" + lines + b"\r\n")[1]
    with pytest.raises(RemoteProtocolError) as caught:
        gate(b"0\r\n" + lines + b"x:\r\n\r\n")
    assert caught.value.status == 431


def test_one_call_walks_over_few_lines() -> None:
    it = ChunkGate(HttpSettings())
    chunks = b"1\r\na\r\n" * 10_000
    assert it.take(chunks) == len(chunks) // 10_000 * 32
    assert it.take(b"fffff\r\n" + b"a" * 0xFFFFF) == 7 + 0xFFFFF  # few lines, however long


@given(st.binary(max_size=40))
def test_the_gate_agrees_with_the_grammar(data: bytes) -> None:
    """What it takes to the end is a chunked body (RFC 9112 section 7.1)."""
    try:
        taken, ended = gate(data)
    except RemoteProtocolError:
        return
    if ended:
        assert re.match(rb"0+[ \t]*(;[^\r\n]*)?\r\n|[0-9a-fA-F]", data[:taken])
        assert data[:taken].endswith(b"\r\n")


@pytest.mark.parametrize("filler", [b" ", b"\t", b"a", b"a ", b"\xe9", b"a: "])
def test_no_value_costs_more_than_its_length(filler: bytes) -> None:
    """64 KiB of anything, with a bad byte behind it, are refused in no time in both ways."""
    head = b"GET / HTTP/1.1\r\nhost: a\r\nx:" + filler * (60_000 // len(filler)) + b"\x01"
    begin = time.process_time()
    assert Recogniser(SETTINGS).recognise_request(head) is None
    assert status_of(head) == 400
    assert time.process_time() - begin < 1
