"""What h11 lets through and leanserve refuses (docs/explain/design.md, section 5).

Everything here is a pure function of bytes. The checks stand beside h11, not in its place: a head has to pass
here *and* in h11, and whoever says no first wins.
"""

from __future__ import annotations

import re
from enum import IntEnum

from leanserve.errors import RemoteProtocolError
from leanserve.protocol.events import FORWARDED, TIMED, BodyKind, Headers, Request, Upgrade
from leanserve.settings import HttpSettings

__all__ = ["ChunkGate", "build_request", "check_head", "check_partial_head", "split_list"]

# RFC 9110 section 5.6.2: token = 1*tchar
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# RFC 9110 section 5.5: field values hold VCHAR, obs-text, SP and HTAB. Other control bytes are "invalid and
# dangerous, due to the varying ways that implementations might parse and interpret those characters".
_FIELD_LINE = _TOKEN + rb":[^\x00-\x08\x0a-\x1f\x7f]*"

# RFC 9112 section 2.1: start-line CRLF *( field-line CRLF ) CRLF. A line that begins with white space
# (obs-fold, section 5.2), a bare CR or LF (section 2.2) and white space before the colon (section 5.1) do
# not match.
_HEAD = re.compile(rb"[^\x00-\x20\x7f][^\x00-\x1f\x7f]*(?:\r\n" + _FIELD_LINE + rb")*")
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]+) HTTP/(\d)\.(\d)")
_TRAILER_LINE = re.compile(_FIELD_LINE + rb"\r\n")

# RFC 3986 section 3.2: authority without userinfo, which RFC 9110 section 4.2.4 has us treat as an error.
_HOST = re.compile(
    rb"(?:\[[0-9A-Fa-f:.]+\]|\[v[0-9A-Fa-f]+\.[A-Za-z0-9\-._~!$&'()*+,;=:]+\]"
    rb"|(?:[A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})+)(?::\d{0,5})?"
)
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)([^?#]*)(?:\?([^#]*))?", re.IGNORECASE)
# RFC 9110 section 8.6: Content-Length = 1*DIGIT. Nineteen digits are below 2**63.
_LENGTH = re.compile(rb"\d{1,19}")
_LENGTH_LINE = re.compile(rb"\r\ncontent-length:([^\r]*)", re.IGNORECASE)
# RFC 9112 section 7.1: chunk-size [ chunk-ext ] CRLF.
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})([ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?)\r\n")

# A chunk-size line with its extensions; nobody we know of sends more than a signature (about 90 bytes).
_CHUNK_LINE_BYTES = 4096
# Extensions may cost as much as the data that they come with, and this much besides.
_CHUNK_EXTENSION_BYTES = 16384
# Of a chunked body (size lines, ends of data, trailers) that are walked over in one call.
_LINES_PER_TAKE = 64


def check_partial_head(buffer: bytes | bytearray, settings: HttpSettings, seen: int = 0) -> None:
    """Refuse a head that is still incomplete but already wrong or too large.

    Args:
        buffer: all of it so far.
        settings: the limits.
        seen: how much of it an earlier call has looked at; a slow head is not searched anew each time.

    Raises:
        RemoteProtocolError: 400, 414 or 431.
    """
    if not buffer:
        return
    if buffer[0] <= 0x20 and buffer != b"\r":
        raise RemoteProtocolError("the request line starts with a space or control byte")
    end = buffer.find(b"\r\n")
    # The last byte may be the CR of the line's end, and a block may lack one byte of its CRLFCRLF.
    if (end < 0 and len(buffer) > settings.request_line_bytes + 1) or end > settings.request_line_bytes:
        raise _beyond(settings, "request_line_bytes", 414)
    if len(buffer) > settings.request_line_bytes + 2 + settings.header_bytes + 3:
        raise _beyond(settings, "header_bytes")
    # RFC 9112 section 2.2 lets a recipient take a lone LF as a line end; peers differ in that, so we do not,
    # and say so at once instead of waiting for a CRLF that will not come.
    if buffer.count(b"\n", seen) != buffer.count(b"\r\n", max(seen - 1, 0)):
        raise RemoteProtocolError("bare LF in the request head")


def _beyond(settings: HttpSettings, name: str, status: int = 431) -> RemoteProtocolError:
    """What to raise beyond a limit; the log tells which, and how much it allows."""
    return RemoteProtocolError(f"more than {name} allows, {getattr(settings, name)}", status=status)


def check_head(head: bytes, settings: HttpSettings) -> None:
    """Check a complete head, without its closing empty line.

    Raises:
        RemoteProtocolError: 400, 414, 431, 501 or 505.
    """
    line, _, rest = head.partition(b"\r\n")
    if len(line) > settings.request_line_bytes:
        raise _beyond(settings, "request_line_bytes", 414)
    if len(rest) > settings.header_bytes:
        raise _beyond(settings, "header_bytes")
    if rest and rest.count(b"\r\n") >= settings.header_count:
        raise _beyond(settings, "header_count")
    if _HEAD.fullmatch(head) is None:
        raise RemoteProtocolError(
            "malformed request head: control byte, bare CR or LF, obs-fold or bad field name"
        )
    # h11 folds "5, 5" and two equal lines into one; RFC 9110 section 8.6 lets us refuse both, and a proxy in
    # front may have read another number.
    lengths = _LENGTH_LINE.findall(head)
    if len(lengths) > 1 or (lengths and _LENGTH.fullmatch(lengths[0].strip(b" \t")) is None):
        raise RemoteProtocolError("repeated or malformed Content-Length")
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise RemoteProtocolError("malformed request line")
    if match[3] != b"1" or match[4] not in (b"0", b"1"):
        raise RemoteProtocolError("HTTP version not supported", status=505)
    if match[1] == b"CONNECT":
        # RFC 9110 section 9.3.6: "most origin servers do not implement CONNECT"; it is for proxies.
        raise RemoteProtocolError("CONNECT is not implemented", status=501)


def split_list(value: bytes) -> list[bytes]:
    """Members of a comma-separated list in lower case, empty ones dropped (RFC 9110 section 5.6.1)."""
    return [item for part in value.lower().split(b",") if (item := part.strip(b" \t"))]


def build_request(method: bytes, target: bytes, version: bytes, headers: Headers) -> Request:
    """Put together a request from parts that passed :func:`check_head` and h11; names are in lower case.

    Raises:
        RemoteProtocolError: 400 or 501.
    """
    raw_path, query, authority = _split_target(method, target)
    request = Request(method, raw_path, query, version.decode("ascii"), headers)
    known: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in _WATCHED:
            if name in known:
                if name in _SINGLE:
                    raise RemoteProtocolError(f"repeated {name.decode()}")
                value = known[name] + b"," + value
            known[name] = value
        elif name in FORWARDED:
            request.forwarded = True
        elif name in TIMED:
            request.timed = True
    _check_host(request, known.get(b"host"), authority)
    _frame_body(request, known)
    _read_connection(request, known)
    return request


_WATCHED = frozenset(
    {b"host", b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"expect", b"te"}
)
_SINGLE = frozenset({b"host", b"content-length", b"transfer-encoding"})


def _split_target(method: bytes, target: bytes) -> tuple[bytes, bytes, bytes | None]:
    """(path, query, authority or None) of a request target (RFC 9112 section 3.2)."""
    if b"#" in target:
        raise RemoteProtocolError("fragment in the request target")
    if target.startswith(b"/"):
        path, _, query = target.partition(b"?")
        return path, query, None
    if target == b"*":
        # RFC 9112 section 3.2.4: the asterisk-form "is only used for a server-wide OPTIONS request".
        if method != b"OPTIONS":
            raise RemoteProtocolError("asterisk-form with another method than OPTIONS")
        return target, b"", None
    match = _ABSOLUTE.fullmatch(target)
    if match is None or _HOST.fullmatch(match[1]) is None:
        raise RemoteProtocolError("request target is neither origin-form, absolute-form nor *")
    path = match[2] or (b"*" if method == b"OPTIONS" and match[3] is None else b"/")
    return path, match[3] or b"", match[1]


def _check_host(request: Request, host: bytes | None, authority: bytes | None) -> None:
    """RFC 9112 section 3.2: 400 to "any HTTP/1.1 request message that lacks a Host header field and to any
    request message that contains more than one Host header field line or ... an invalid field value"."""
    if host is None:
        if request.version == "1.1":
            raise RemoteProtocolError("no Host header")
    elif host and _HOST.fullmatch(host) is None:
        raise RemoteProtocolError("invalid Host header")
    if authority is not None:
        # Section 3.2.2: with absolute-form the server "MUST ignore the received Host header field (if any)
        # and instead use the host information of the request-target".
        request.headers = [item for item in request.headers if item[0] != b"host"]
        request.headers.insert(0, (b"host", authority))


def _frame_body(request: Request, known: dict[bytes, bytes]) -> None:
    """RFC 9112 section 6: how long the body is, decided in one place."""
    length, coding = known.get(b"content-length"), known.get(b"transfer-encoding")
    if coding is not None:
        if length is not None:
            # Section 6.1: "A server MAY reject a request that contains both"; so are requests smuggled.
            raise RemoteProtocolError("Transfer-Encoding together with Content-Length")
        if request.version == "1.0":
            # Section 6.1: "MUST treat the message as if the framing is faulty".
            raise RemoteProtocolError("Transfer-Encoding in an HTTP/1.0 request")
        if coding.lower() != b"chunked":
            known_only = all(item == b"chunked" for item in split_list(coding))
            raise RemoteProtocolError("unsupported Transfer-Encoding", status=400 if known_only else 501)
        request.body, request.content_length = BodyKind.CHUNKED, None
    elif length is not None and (size := int(length)):
        request.body, request.content_length = BodyKind.LENGTH, size


def _read_connection(request: Request, known: dict[bytes, bytes]) -> None:
    options = split_list(known[b"connection"]) if b"connection" in known else []
    if request.version == "1.0":
        # RFC 9112 section 9.3: 1.0 persists when "the keep-alive connection option is present". Expect and
        # Upgrade have to be ignored in 1.0 (RFC 9110 sections 10.1.1 and 7.8).
        request.keep_alive = b"keep-alive" in options and b"close" not in options
        return
    request.keep_alive = b"close" not in options
    if b"expect" in known and request.body is not BodyKind.NONE:
        request.expects_continue = known[b"expect"].lower() == b"100-continue"
    if b"te" in known:
        request.accepts_trailers = b"trailers" in split_list(known[b"te"])
    # RFC 9110 section 7.8: without the connection option the Upgrade field says nothing to us. RFC 6455
    # section 4.1 wants a GET; another method with such a field is an ordinary request.
    if b"upgrade" in known and b"upgrade" in options and request.method == b"GET":
        request.upgrade = Upgrade.WEBSOCKET if b"websocket" in split_list(known[b"upgrade"]) else Upgrade.NONE


class _Expect(IntEnum):
    SIZE = 0
    DATA = 1
    DATA_END = 2
    TRAILER = 3
    NOTHING = 4


class ChunkGate:
    """Walks beside h11 through a chunked body (RFC 9112 section 7.1).

    It knows where the message ends, so h11 is never given a byte of the next one, and it refuses what h11
    takes: bare LF in the trailers, trailers, extensions and data without bound, control bytes.

    Args:
        settings: the limits.
    """

    __slots__ = (
        "_data_bytes",
        "_expect",
        "_extension_bytes",
        "_left",
        "_line",
        "_settings",
        "_trailer_bytes",
        "_trailers",
    )

    def __init__(self, settings: HttpSettings) -> None:
        self._expect = _Expect.SIZE
        self._left = 0
        self._line = b""
        self._data_bytes = 0
        self._extension_bytes = 0
        self._trailer_bytes = 0
        self._trailers = 0
        self._settings = settings

    @property
    def ended(self) -> bool:
        """Whether the message is complete."""
        return self._expect is _Expect.NOTHING

    def take(self, data: bytes | bytearray) -> int:
        """Walk over `data`; return how many of its bytes belong to this message, or fewer if they are many
        lines: the work of one call is bounded.

        Raises:
            RemoteProtocolError: 400, 413 or 431.
        """
        position, size, lines = 0, len(data), 0
        while position < size and lines < _LINES_PER_TAKE and self._expect is not _Expect.NOTHING:
            if self._expect is _Expect.DATA:
                step = min(self._left, size - position)
                self._left -= step
                position += step
                if not self._left:
                    self._expect = _Expect.DATA_END
                continue
            end = data.find(b"\n", position) + 1
            self._line += data[position : end or size]
            position = end or size
            if end:
                lines += 1
                line, self._line = self._line, b""
                self._end_line(line)
            else:
                self._check_partial_line()
        return position

    def _check_partial_line(self) -> None:
        limit = self._settings.trailer_bytes if self._expect is _Expect.TRAILER else _CHUNK_LINE_BYTES
        if len(self._line) > limit:
            raise RemoteProtocolError("line too long in a chunked body", status=431)
        if self._expect is _Expect.DATA_END and self._line != b"\r":
            raise RemoteProtocolError("chunk data is longer than its size")

    def _end_line(self, line: bytes) -> None:
        if self._expect is _Expect.SIZE:
            self._end_size_line(line)
        elif self._expect is _Expect.DATA_END:
            if line != b"\r\n":
                raise RemoteProtocolError("chunk data is longer than its size")
            self._expect = _Expect.SIZE
        elif line == b"\r\n":
            self._expect = _Expect.NOTHING
        else:
            self._trailers += 1
            self._trailer_bytes += len(line)
            limits = self._settings
            if self._trailer_bytes > limits.trailer_bytes:
                raise _beyond(limits, "trailer_bytes")
            if self._trailers > limits.header_count:
                raise _beyond(limits, "header_count")
            if _TRAILER_LINE.fullmatch(line) is None:
                raise RemoteProtocolError("malformed trailer line")

    def _end_size_line(self, line: bytes) -> None:
        match = _CHUNK_SIZE.fullmatch(line)
        if match is None or len(line) > _CHUNK_LINE_BYTES:
            raise RemoteProtocolError("malformed chunk size line")
        self._left = int(match[1], 16)
        self._data_bytes += self._left
        limit = self._settings.max_body_size
        if limit is not None and self._data_bytes > limit:
            # The size line announces its chunk: none of that data is read.
            raise RemoteProtocolError(f"chunked body larger than max_body_size, {limit}", status=413)
        self._extension_bytes += len(match[2])
        if self._extension_bytes > self._data_bytes + _CHUNK_EXTENSION_BYTES:
            raise RemoteProtocolError("chunk extensions outweigh the data")
        self._expect = _Expect.DATA if self._left else _Expect.TRAILER
