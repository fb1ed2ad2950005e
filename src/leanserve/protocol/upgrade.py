"""The opening handshake of WebSocket (RFC 6455 section 4.2), on a request that has been parsed already.

The request is never written back to bytes for another parser to read: two parsers can disagree.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass

from wsproto.utilities import generate_accept_token

from leanserve.errors import AppProtocolError, RemoteProtocolError
from leanserve.protocol.events import BodyKind, Headers, Request
from leanserve.protocol.responses import check_headers
from leanserve.protocol.strict import split_list

__all__ = ["Handshake", "build_accept", "parse_handshake"]

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
# What the server says itself in a 101, and what must not stand there (RFC 9110 sections 6.4.1 and 8.6).
_OURS = frozenset({b"upgrade", b"connection", b"content-length", b"transfer-encoding"})


@dataclass(frozen=True, slots=True)
class Handshake:
    """What the client asked for.

    Attributes:
        key: Sec-WebSocket-Key as sent: 16 bytes in base64.
        subprotocols: offered, in the client's order of preference, each once.
        extensions: offered elements of Sec-WebSocket-Extensions, parameters included.
    """

    key: bytes
    subprotocols: list[str]
    extensions: list[str]


def parse_handshake(request: Request) -> Handshake:
    """Check an upgrade request.

    Raises:
        RemoteProtocolError: status 426, with headers, for another version of the protocol, else 400.
    """
    _check_request(request)
    _check_version(_values(request, b"sec-websocket-version"))
    key = _check_key(_values(request, b"sec-websocket-key"))
    subprotocols = _elements(request, b"sec-websocket-protocol")
    if any(_TOKEN.fullmatch(name) is None for name in subprotocols):
        raise RemoteProtocolError("subprotocol is not a token")
    extensions = _elements(request, b"sec-websocket-extensions")
    if any(_TOKEN.fullmatch(offer.partition(";")[0].rstrip(" \t")) is None for offer in extensions):
        raise RemoteProtocolError("extension name is not a token")
    return Handshake(key, list(dict.fromkeys(subprotocols)), extensions)


def build_accept(
    handshake: Handshake,
    subprotocol: str | None,
    headers: Iterable[tuple[bytes, bytes]] = (),
    extension: str | None = None,
) -> tuple[int, Headers]:
    """The answer that opens the connection (RFC 6455 section 4.2.2), as status and headers.

    Args:
        handshake: what is answered.
        subprotocol: the application's choice among those offered, or None.
        headers: of the application.
        extension: value for Sec-WebSocket-Extensions, already agreed on.

    Raises:
        AppProtocolError: a subprotocol that was not offered, or a header that the application may not set.
    """
    if subprotocol is not None and subprotocol not in handshake.subprotocols:
        # RFC 6455 section 4.1: the client must fail the connection if the subprotocol "was not present in the
        # client's handshake".
        raise AppProtocolError(f"subprotocol {subprotocol!r} was not offered by the client")
    accepted: Headers = [
        (b"upgrade", b"websocket"),
        (b"connection", b"upgrade"),
        (b"sec-websocket-accept", generate_accept_token(handshake.key)),
    ]
    if subprotocol is not None:
        accepted.append((b"sec-websocket-protocol", subprotocol.encode("ascii")))
    if extension is not None:
        accepted.append((b"sec-websocket-extensions", extension.encode("ascii")))
    for name, value in check_headers(headers):
        if name in _OURS or name.startswith(b"sec-websocket-"):
            raise AppProtocolError(f"header {name!r} of a WebSocket handshake is the server's to set")
        accepted.append((name, value))
    return 101, accepted


def _check_request(request: Request) -> None:
    # RFC 6455 section 4.2.1: "An HTTP/1.1 or higher GET request".
    if request.method != b"GET" or request.version == "1.0":
        raise RemoteProtocolError("WebSocket handshake is not a GET of HTTP/1.1")
    # What one side reads as a body another may read as frames or as the next request (GHSA-mfx4-hv73-q22v).
    if request.body is BodyKind.CHUNKED or request.content_length:
        raise RemoteProtocolError("WebSocket handshake announces a body")
    asked, options = _options(request, b"upgrade"), _options(request, b"connection")
    if b"websocket" not in asked or b"upgrade" not in options:
        raise RemoteProtocolError("WebSocket handshake without Upgrade: websocket and Connection: upgrade")


def _check_version(values: list[bytes]) -> None:
    if len(values) != 1:
        raise RemoteProtocolError(f"{len(values)} Sec-WebSocket-Version lines")
    if values[0] != b"13":
        # RFC 6455 section 4.2.2: "an appropriate HTTP error code (such as 426 Upgrade Required) and a
        # |Sec-WebSocket-Version| header field". RFC 9110 section 15.5.22: a 426 has an Upgrade field.
        headers = [(b"upgrade", b"websocket"), (b"connection", b"upgrade"), (b"sec-websocket-version", b"13")]
        raise RemoteProtocolError("another version of WebSocket than 13", status=426, headers=headers)


def _check_key(values: list[bytes]) -> bytes:
    if len(values) != 1:
        raise RemoteProtocolError(f"{len(values)} Sec-WebSocket-Key lines")
    try:
        nonce = base64.b64decode(values[0], validate=True)
    except binascii.Error:
        nonce = b""
    # RFC 6455 section 4.2.1: "a base64-encoded value that, when decoded, is 16 bytes in length".
    if len(nonce) != 16:
        raise RemoteProtocolError("Sec-WebSocket-Key is not 16 bytes in base64")
    return values[0]


def _values(request: Request, wanted: bytes) -> list[bytes]:
    return [value for name, value in request.headers if name == wanted]


def _options(request: Request, wanted: bytes) -> list[bytes]:
    return [option for value in _values(request, wanted) for option in split_list(value)]


def _elements(request: Request, wanted: bytes) -> list[str]:
    """Elements of a list over all lines of a header; empty ones do not count (RFC 9110 section 5.6.1.2)."""
    try:
        text = b",".join(_values(request, wanted)).decode("ascii")
    except UnicodeDecodeError:
        raise RemoteProtocolError(f"{wanted.decode()} is not ASCII") from None
    return [element for part in text.split(",") if (element := part.strip(" \t"))]
