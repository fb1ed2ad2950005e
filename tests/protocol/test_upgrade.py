"""The opening handshake: corpus, every field, every answer."""

from __future__ import annotations

import base64

import pytest

import corpus_reader
from leanserve.errors import AppProtocolError, RemoteProtocolError
from leanserve.protocol.events import BodyKind, Headers, Request
from leanserve.protocol.http1 import Http1Codec
from leanserve.protocol.upgrade import Handshake, build_accept, parse_handshake
from leanserve.settings import HttpSettings

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="  # of RFC 6455 section 1.3
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def request(*extra: tuple[bytes, bytes], without: bytes = b"", **facts: object) -> Request:
    headers: Headers = [
        (b"host", b"a.example"),
        (b"upgrade", b"websocket"),
        (b"connection", b"Upgrade"),
        (b"sec-websocket-key", KEY),
        (b"sec-websocket-version", b"13"),
    ]
    kept = [item for item in headers if item[0] != without]
    made = Request(b"GET", b"/ws", b"", "1.1", [*kept, *extra])
    for name, value in facts.items():
        setattr(made, name, value)
    return made


def refused(made: Request) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as caught:
        parse_handshake(made)
    return caught.value


def test_the_plain_handshake() -> None:
    assert parse_handshake(request()) == Handshake(KEY, [], [])


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name) for case in corpus_reader.load() if case.layer == "websocket"]
)
def test_corpus(case: corpus_reader.Case) -> None:
    codec = Http1Codec(HttpSettings())
    codec.receive(case.raw)
    made = codec.next_event()
    assert isinstance(made, Request)
    assert case.verdict == "refuse"
    assert refused(made).status in case.statuses, case.why


@pytest.mark.parametrize(
    "made",
    [
        request(method=b"POST"),
        request(version="1.0"),
        request(body=BodyKind.CHUNKED, content_length=None),
        request(body=BodyKind.LENGTH, content_length=1),
        request(without=b"upgrade"),
        request((b"upgrade", b"h2c"), without=b"upgrade"),
        request(without=b"connection"),
        request((b"connection", b"keep-alive"), without=b"connection"),
        request(without=b"sec-websocket-version"),
        request((b"sec-websocket-version", b"13")),
        request(without=b"sec-websocket-key"),
        request((b"sec-websocket-key", KEY)),
    ],
)
def test_what_is_not_a_handshake_is_400(made: Request) -> None:
    assert refused(made).status == 400


@pytest.mark.parametrize(
    "key",
    [
        b"", b"x", b"=", KEY[:-1], KEY + b"=", KEY + b"AAAA", b"*" + KEY, KEY + b"\n", KEY + b" ",
        base64.b64encode(bytes(15)), base64.b64encode(bytes(17)), b"\xff" * 24, KEY + b", " + KEY,
    ],
)  # fmt: skip
def test_keys_that_are_not_16_bytes(key: bytes) -> None:
    assert refused(request((b"sec-websocket-key", key), without=b"sec-websocket-key")).status == 400


@pytest.mark.parametrize("version", [b"", b"0", b"7", b"8", b"12", b"14", b"13, 8", b"\xff", b"013"])
def test_another_version_is_told_ours(version: bytes) -> None:
    error = refused(request((b"sec-websocket-version", version), without=b"sec-websocket-version"))
    assert error.status == 426
    assert (b"sec-websocket-version", b"13") in error.headers
    assert (b"upgrade", b"websocket") in error.headers
    assert (b"connection", b"upgrade") in error.headers


def test_an_old_version_needs_no_key() -> None:
    made = request(without=b"sec-websocket-key")
    made.headers[-1] = (b"sec-websocket-version", b"0")
    assert refused(made).status == 426


def test_options_are_compared_without_case_and_in_lists() -> None:
    made = request((b"upgrade", b"h2c, WebSocket"), (b"connection", b"keep-alive, UPGRADE"))
    made.headers = [item for item in made.headers if item[1] not in (b"websocket", b"Upgrade")]
    assert parse_handshake(made).key == KEY


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([b"chat"], ["chat"]),
        ([b"chat, superchat"], ["chat", "superchat"]),
        ([b"chat,superchat ,\tx"], ["chat", "superchat", "x"]),
        ([b"chat", b"superchat"], ["chat", "superchat"]),
        ([b"chat, chat"], ["chat"]),
        ([b"", b",,", b"chat,"], ["chat"]),
        ([b"graphql-transport-ws", b"v1.x!#$%&'*+-.^_`|~"], ["graphql-transport-ws", "v1.x!#$%&'*+-.^_`|~"]),
    ],
)
def test_subprotocols(lines: list[bytes], expected: list[str]) -> None:
    made = request(*((b"sec-websocket-protocol", line) for line in lines))
    assert parse_handshake(made).subprotocols == expected


@pytest.mark.parametrize("value", [b"\x80\xff", b"a b", b'"a"', b"chat, su/per", b"a=b", b";", "é".encode()])
@pytest.mark.parametrize("name", [b"sec-websocket-protocol", b"sec-websocket-extensions"])
def test_what_is_no_token_is_400(name: bytes, value: bytes) -> None:
    assert refused(request((name, value))).status == 400


def test_a_subprotocol_has_no_parameters() -> None:
    assert refused(request((b"sec-websocket-protocol", b"a;b"))).status == 400


def test_extension_offers_stay_whole() -> None:
    made = request((b"sec-websocket-extensions", b"permessage-deflate; client_max_window_bits, x"))
    assert parse_handshake(made).extensions == ["permessage-deflate; client_max_window_bits", "x"]


# Answers

SHAKE = Handshake(KEY, ["chat", "superchat"], [])


def test_accept() -> None:
    status, headers = build_accept(SHAKE, None)
    assert status == 101
    assert headers == [
        (b"upgrade", b"websocket"), (b"connection", b"upgrade"), (b"sec-websocket-accept", ACCEPT),
    ]  # fmt: skip


def test_accept_with_everything() -> None:
    own = [(b"X-Own", b"1"), (b"set-cookie", b"a=b")]
    _, headers = build_accept(SHAKE, "superchat", own, "permessage-deflate")
    assert headers[3:] == [
        (b"sec-websocket-protocol", b"superchat"),
        (b"sec-websocket-extensions", b"permessage-deflate"),
        (b"x-own", b"1"),
        (b"set-cookie", b"a=b"),
    ]


@pytest.mark.parametrize("subprotocol", ["", "Chat", "other", "chat, superchat", "é", "chat\r\nx: y"])
def test_only_an_offered_subprotocol_is_accepted(subprotocol: str) -> None:
    with pytest.raises(AppProtocolError, match="not offered"):
        build_accept(SHAKE, subprotocol)


@pytest.mark.parametrize(
    "header",
    [
        (b"x", b"a\r\nb: c"), (b"x", b"a\nb"), (b"x", b"a\0"), (b"x", b"\x1b[0m"), (b"x", b"\x7f"),
        (b"", b"a"), (b"x y", b"a"), (b"x:", b"a"), (b"x\r\n", b"a"), (b"\xff", b"a"),
        (b"sec-websocket-protocol", b"chat"), (b"Sec-WebSocket-Accept", b"x"),
        (b"sec-websocket-extensions", b"x"),
        (b"Connection", b"close"), (b"upgrade", b"h2c"), (b"content-length", b"0"),
        (b"transfer-encoding", b"chunked"),
    ],
)  # fmt: skip
def test_headers_that_the_application_may_not_send(header: tuple[bytes, bytes]) -> None:
    with pytest.raises(AppProtocolError):
        build_accept(SHAKE, None, [header])
