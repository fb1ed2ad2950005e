"""Responses: header hygiene, body framing decided once per response, and the bytes.

h11 is not asked here: what it would add, framing and connection options, is decided before. The differential
tests hold it beside every kind of response.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from http import HTTPStatus

from leanserve.errors import AppProtocolError
from leanserve.protocol.events import Headers, Request
from leanserve.protocol.strict import split_list

__all__ = [
    "CHUNK_SIZE",
    "JOINED_BYTES",
    "REASONS",
    "DefaultHeaders",
    "Framing",
    "Numbered",
    "ResponseHead",
    "check_headers",
    "encode_chunk",
    "encode_head",
    "encode_interim",
    "encode_last_chunk",
    "encode_probe",
    "encode_refusal",
    "plan_response",
]

#: Reason phrases by status; optional on the wire (RFC 9112 section 4), but people read them.
REASONS = {status.value: status.phrase.encode("ascii") for status in HTTPStatus}

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
# RFC 9110 section 5.5: no CR, LF, NUL and, as we read "invalid", no other control byte but HTAB.
_BAD_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class Framing(IntEnum):
    """How the end of a response body is marked (RFC 9112 section 6.3)."""

    NONE = 0
    LENGTH = 1
    CHUNKED = 2
    CLOSE = 3


@dataclass(slots=True)
class ResponseHead:
    """A response as it goes out.

    Attributes:
        status: its status code.
        headers: all of them, framing and connection options included.
        framing: how the body is delimited; NONE drops whatever the application sends.
        close: whether the connection closes behind it.
        left: body bytes still to come when framing is LENGTH.
        fault: what is wrong with the length of the body, if anything: the connection has to close.
    """

    status: int
    headers: Headers
    framing: Framing
    close: bool
    left: int = 0
    fault: str | None = None

    def admit(self, size: int) -> int:
        """How many of `size` body bytes may go out; what is beyond the declared length is a fault."""
        if self.framing is not Framing.LENGTH:
            return size
        if size > self.left:
            self.fault = (
                f"response body is longer than its content-length, by {size - self.left} bytes or more"
            )
            size = self.left
        self.left -= size
        return size

    def check_complete(self) -> bool:
        """Whether the body has its declared length; a shorter one is a fault."""
        if self.framing is Framing.LENGTH and self.left:
            self.fault = f"response body is {self.left} bytes shorter than its content-length"
        return self.fault is None


class DefaultHeaders:
    """Headers added where the application has none of that name (date, server, the operator's own).

    Attributes:
        headers: them, names in lower case.
        names: their names.
        block: them as bytes, each line with its end.
    """

    __slots__ = ("block", "headers", "names")

    def __init__(self, headers: Headers) -> None:
        self.headers = headers
        self.names = frozenset(name for name, _ in headers)
        self.block = b"".join(b"%b: %b\r\n" % item for item in headers)

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return iter(self.headers)


def check_headers(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Copy headers, names in lower case.

    Raises:
        AppProtocolError: not pairs of bytes, a name that is no token, a value with a control byte: what would
            let data of one client become headers of a response (CVE-2020-7695 and its kin).
    """
    checked: Headers = []
    try:
        for name, value in headers:
            if _NAME.fullmatch(name) is None:
                raise AppProtocolError(f"header name {name!r} is not a token")
            if _BAD_VALUE.search(value) is not None:
                raise AppProtocolError(f"value of header {name!r} has a control byte")
            checked.append((bytes(name).lower(), bytes(value).strip(b" \t")))
    except (TypeError, ValueError) as error:
        raise AppProtocolError(f"headers must be pairs of bytes: {error}") from error
    return checked


# RFC 9110 section 6.5.1: no trailer field may bear on framing, routing or the connection.
_NO_TRAILERS = frozenset(
    {b"connection", b"content-length", b"host", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
)


def check_trailers(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """As :func:`check_headers`, for what stands behind the body. Raises AppProtocolError."""
    checked = check_headers(headers)
    for name, _ in checked:
        if name in _NO_TRAILERS:
            raise AppProtocolError(f"{name.decode()} cannot be a trailer")
    return checked


def plan_response(
    request: Request,
    status: int,
    headers: Iterable[tuple[bytes, bytes]],
    defaults: Iterable[tuple[bytes, bytes]],
    *,
    known_length: int | None,
    close: bool,
) -> ResponseHead:
    """Decide framing and connection options of a response.

    Args:
        request: what is answered.
        status: 200 to 599 (interim responses are not planned).
        headers: the application's, as :func:`check_headers` gave them back.
        defaults: added where the application set none of that name.
        known_length: size of the whole body when it is at hand.
        close: the server wants to close behind this response.

    Raises:
        AppProtocolError: a status or header that HTTP does not allow.
    """
    if not isinstance(status, int) or not 200 <= status <= 999:
        raise AppProtocolError(f"{status!r} is not the status of a final response")
    kept: Headers = []
    length: int | None = None
    seen = set()
    for name, value in headers:
        seen.add(name)
        if name == b"content-length":
            length = _merge_length(length, value)
        elif name == b"connection":
            options = split_list(value)
            close = close or b"close" in options
            kept += [(name, option) for option in options if option not in (b"close", b"keep-alive")]
        elif name == b"transfer-encoding":
            # Framing is the server's: an application that copied "chunked" from elsewhere means no harm.
            if value.lower() != b"chunked":
                raise AppProtocolError("transfer-encoding is the server's to set")
        else:
            kept.append((name, value))
    kept += [item for item in defaults if item[0] not in seen]
    framing = _choose_framing(request, status, length, known_length)
    head = ResponseHead(status, kept, framing, close or not request.keep_alive)
    _add_framing_headers(request, head, length, known_length)
    return head


def _merge_length(length: int | None, value: bytes) -> int:
    # Nineteen digits are below 2**63; far more of them would be an error of int() itself.
    if not value.isdigit() or len(value) > 19 or (length is not None and length != int(value)):
        raise AppProtocolError(f"content-length {value!r} is not one decimal number")
    return int(value)


def _choose_framing(request: Request, status: int, length: int | None, known_length: int | None) -> Framing:
    # RFC 9110 sections 9.3.2, 15.3.5 and 15.4.5: no content in answers to HEAD, in 204 and in 304.
    # Section 15.3.6: "a server MUST NOT generate content in a 205 response".
    if request.method == b"HEAD" or status in (204, 205, 304):
        return Framing.NONE
    if length is not None or known_length is not None:
        return Framing.LENGTH
    # RFC 9112 section 7.1: a 1.0 recipient need not understand chunked: the close ends the body.
    return Framing.CHUNKED if request.version == "1.1" else Framing.CLOSE


def _add_framing_headers(
    request: Request, head: ResponseHead, length: int | None, known_length: int | None
) -> None:
    if head.framing is Framing.LENGTH:
        head.left = known_length if length is None and known_length is not None else length or 0
        head.headers.append((b"content-length", b"%d" % head.left))
    elif head.status == 205:
        # RFC 9110 section 15.3.6: zero content is said by "Content-Length: 0" or by an empty chunked body.
        head.headers.append((b"content-length", b"0"))
    elif head.framing is Framing.NONE and length is not None and head.status != 204:
        # RFC 9110 section 8.6: HEAD and 304 may carry the length that GET would have had; 204 must not.
        head.headers.append((b"content-length", b"%d" % length))
    if head.framing is Framing.CHUNKED:
        head.headers.append((b"transfer-encoding", b"chunked"))
    if head.framing is Framing.CLOSE:
        head.close = True
    if head.close:
        head.headers.append((b"connection", b"close"))
    elif request.version == "1.0":
        # RFC 9112 section 9.3: a 1.0 connection persists when both sides say so and the message has an end.
        head.headers.append((b"connection", b"keep-alive"))


def encode_head(head: ResponseHead) -> bytes:
    """The head of a planned response; all checks are behind it."""
    lines = [b"%b: %b\r\n" % item for item in head.headers]
    return b"HTTP/1.1 %d %b\r\n%b\r\n" % (head.status, REASONS.get(head.status, b""), b"".join(lines))


def encode_interim(status: int, headers: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """An interim (1xx) response (RFC 9110 section 15.2); `headers` are checked."""
    lines = [b"%b: %b\r\n" % item for item in headers]
    return b"HTTP/1.1 %d %b\r\n%b\r\n" % (status, REASONS.get(status, b""), b"".join(lines))


def encode_probe(request: Request, head: ResponseHead | None) -> bytes:
    """Bytes that may go out ahead of any answer and change none; b"" where there are none.

    - RFC 9110 section 15.2: "A client MUST be able to parse one or more 1xx responses received prior to a
      final response, even if the client does not expect one."
    - RFC 9112 section 7.1: a chunk-size is ``1*HEXDIG``: a leading zero of the next one.

    Within a body of declared length there is nothing, nor for HTTP/1.0: "A server MUST NOT send a 1xx
    response to an HTTP/1.0 client".
    """
    if head is None:
        return encode_interim(100, ()) if request.version == "1.1" else b""
    return b"0" if head.framing is Framing.CHUNKED else b""


def encode_refusal(status: int, defaults: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A whole response to something that never became an exchange; the connection closes behind it."""
    reason = REASONS.get(status, b"Error")
    headers = [
        *defaults,
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", b"%d" % len(reason)),
        (b"connection", b"close"),
    ]
    return encode_head(ResponseHead(status, headers, Framing.LENGTH, True)) + reason


#: Pieces of a body from this size on are written beside their framing: joining would copy them.
JOINED_BYTES = 65536


class Numbered(dict[int, bytes]):
    """Bytes with a number in them, by number. Small numbers come again, and to format one takes as long as
    the rest of the line; they are kept.

    Args:
        template: has one place for a number.
    """

    __slots__ = ("_template",)

    def __init__(self, template: bytes) -> None:
        self._template = template

    def __missing__(self, number: int) -> bytes:
        line = self._template % number
        if number < _SMALL:
            self[number] = line
        return line


_SMALL = 2048

#: What stands in front of a chunk, by its length (RFC 9112 section 7.1); behind it stands a CRLF.
CHUNK_SIZE = Numbered(b"%x\r\n")


def encode_chunk(data: bytes) -> list[bytes]:
    """A piece of a chunked body in pieces: `data`, which may not be empty, is not copied."""
    return [CHUNK_SIZE[len(data)], data, b"\r\n"]


_LAST_CHUNK = b"0\r\n\r\n"


def encode_last_chunk(trailers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """The end of a chunked body; `trailers` are checked."""
    if not trailers:
        return [_LAST_CHUNK]
    return [b"0\r\n", *(b"%b: %b\r\n" % item for item in trailers), b"\r\n"]
