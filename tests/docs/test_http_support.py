"""The tables of docs/explain/http-support.md are run: codec with and without the recogniser, and a server."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from corpus_reader import unescape
from docs.documents import code, read, table
from leanserve import Server
from leanserve.errors import AppProtocolError, RemoteProtocolError
from leanserve.protocol.events import Data, EndOfBody, Request, Upgrade
from leanserve.protocol.fastpath import Recogniser
from leanserve.protocol.http1 import Http1Codec
from leanserve.protocol.responses import check_headers
from leanserve.protocol.upgrade import build_accept, parse_handshake
from leanserve.protocol.websocket import (
    Close,
    Partial,
    Ping,
    Pong,
    WebSocketCodec,
)
from leanserve.settings import HttpSettings

PAGE = read("explain/http-support.md")


def rows(*header: str) -> list[pytest.param]:
    """Rows of the page's tables, each with the text of its first column as its name."""
    return [
        pytest.param(*map(code, cells[:-1]), id=cells[0].strip("`")[:60]) for cells in table(PAGE, *header)
    ]


# Requests

REQUESTS = rows("bytes", "answer", "why")


def _head_seen(request: Request) -> bytes:
    return request.raw_path + (b"?" + request.query if request.query else b"")


def _read(codec: Http1Codec) -> str:
    """What the page calls the answer."""
    seen: list[bytes] = []
    body = b""
    try:
        while (event := codec.next_event()) is not None:
            if isinstance(event, Request):
                seen = [event.method, _head_seen(event)]
            elif isinstance(event, Data):
                body += event.data
            if codec.request_ended:
                assert isinstance(event, EndOfBody) or not event.body
                assert codec.request is not None
                close = "" if codec.request.keep_alive else ", close"
                said = b" ".join([*seen, body] if body else seen).decode("latin-1")
                return f"app: {said}{close}"
    except RemoteProtocolError as error:
        return str(error.status)
    return "wait"


def _expected(answer: str) -> str:
    return unescape(answer).decode("latin-1") if "{{" in answer else answer


@pytest.mark.parametrize("recognised", [True, False], ids=["recognised", "strict"])
@pytest.mark.parametrize(("raw", "answer"), REQUESTS)
def test_requests_in_the_codec(raw: str, answer: str, recognised: bool) -> None:
    settings = HttpSettings()
    codec = Http1Codec(settings, Recogniser(settings) if recognised else None)
    codec.receive(unescape(raw))
    assert _read(codec) == _expected(answer)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """What reached the application, as the page writes it."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message["body"]
        more = message["more_body"]
    target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    parts = [scope["method"].encode(), target, *([body] if body else [])]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"app: " + b" ".join(parts)})


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server in a thread."""
    with Server(echo, port=0, access_log=False, log_level="critical") as running:
        yield running


def _first_answer(server: Server, raw: bytes) -> str:
    (address, *_) = server.addresses
    with socket.create_connection(address, 10) as client:
        client.sendall(raw)
        client.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    while answer.startswith(b"HTTP/1.1 100"):
        answer = answer.partition(b"\r\n\r\n")[2]
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        assert b"\r\nconnection: close" in head
        return head.split(b" ")[1].decode()
    close = ", close" if b"\r\nconnection: close" in head else ""
    return f"{body.decode('latin-1')}{close}"


@pytest.mark.parametrize(("raw", "answer"), [row for row in REQUESTS if row.values[1] != "wait"])
def test_requests_to_a_server(server: Server, raw: str, answer: str) -> None:
    assert _first_answer(server, unescape(raw)) == _expected(answer)


# Responses


def _say(app: str) -> tuple[int, list[tuple[bytes, bytes]], list[bytes]]:
    """Status, headers and body messages of ``200 name: value "ab" + "c"``."""
    status, _, rest = app.partition(" ")
    pieces = [unescape(piece) for piece in re.findall(r'"([^"]*)"', rest)]
    header = rest.partition('"')[0].strip()
    name, colon, value = header.partition(": ")
    return int(status), [(name.encode(), unescape(value))] if colon else [], pieces


def _wire(request: str, app: str) -> str:
    """What goes over the wire, as the page writes it."""
    method, version = request.split(" ")
    codec = Http1Codec(HttpSettings())
    codec.receive(f"{method} / HTTP/{version}\r\nHost: a\r\n\r\n".encode())
    assert isinstance(codec.next_event(), Request)
    status, headers, (first, *rest) = _say(app)
    try:
        sent = codec.encode_response(status, check_headers(headers), [], first, more=bool(rest), close=False)
    except AppProtocolError:
        return "error"
    for index, piece in enumerate(rest, 1):
        sent += codec.encode_body(piece, more=index < len(rest))
    assert codec.response is not None
    head, _, body = sent.partition(b"\r\n\r\n")
    lines = ", ".join(line.decode() for line in head.split(b"\r\n")[1:])
    text = body.decode().replace("\r\n", "\\r\\n")
    said = f'{lines} "{text}"' if lines else f'"{text}"'
    if codec.response.fault is not None:
        return f"{said} error"
    return f"{said} closes" if codec.response.close else said


@pytest.mark.parametrize(
    ("request_line", "app", "wire"), rows("request", "the application", "on the wire", "why")
)
def test_responses(request_line: str, app: str, wire: str) -> None:
    assert _wire(request_line, app) == wire


# WebSocket


def _handshake(text: str) -> bytes:
    """The bytes of a row: H, K and V are spelled out above the table."""
    words = dict(re.findall(r"`([HKV])` (?:stands )?for\s+`([^`]+)`", PAGE))
    assert set(words) == {"H", "K", "V"}
    raw = b""
    while text[:1] in words and text[1:2] == " ":
        raw += unescape(words[text[0]])
        text = text[2:]
    return raw + unescape(text)


@pytest.mark.parametrize(("text", "answer"), rows("handshake", "answer", "why"))
def test_handshakes(text: str, answer: str) -> None:
    codec = Http1Codec(HttpSettings())
    codec.receive(_handshake(text))
    request = codec.next_event()
    assert isinstance(request, Request)
    assert request.upgrade is Upgrade.WEBSOCKET
    try:
        status, _ = build_accept(parse_handshake(request), None)
        headers: Any = ()
    except RemoteProtocolError as error:
        status, headers = error.status, error.headers
    assert str(status) == answer
    # RFC 6455 section 4.2.2: a 426 names the version that is spoken
    assert ((b"sec-websocket-version", b"13") in headers) is (status == 426)


def _frames(raw: bytes) -> str:
    codec = WebSocketCodec(max_size_bytes=16, max_fragments=2)
    codec.receive(raw)
    try:
        while isinstance(event := codec.next_event(), Partial):
            pass
    except RemoteProtocolError as error:
        return str(error.close_code)
    match event:
        case str():
            return f"text {event}"
        case Close():
            return f"close {event.code}"
        case Ping():
            return f"ping {event.payload.decode()}"
    assert isinstance(event, bytes | Pong | None)
    return repr(event)


@pytest.mark.parametrize(("raw", "answer"), rows("frames", "event or close code", "why"))
def test_frames(raw: str, answer: str) -> None:
    assert _frames(unescape(raw)) == answer
