"""The plain case, recognised in front of h11 (docs/explain/design.md, section 4).

A recogniser returns exactly what the strict way would return, or None. It never raises, never answers and
has no options; None costs nothing but the time of the strict way. Deleting this module leaves every other
test green.
"""

from __future__ import annotations

import re

from leanserve.protocol.events import BodyKind, Headers, Request
from leanserve.settings import HttpSettings

__all__ = ["Recogniser"]

# Methods and origin-form targets as browsers, clients and proxies send them; no fragment, nothing but ASCII.
_REQUEST_LINE = re.compile(
    rb"(GET|POST|HEAD|PUT|DELETE|PATCH|OPTIONS) "
    rb"(/[\x21\x22\x24-\x3e\x40-\x7e]*)(?:\?([\x21\x22\x24-\x7e]*))? HTTP/1\.1"
)
# token ":" OWS value OWS (RFC 9112 section 5).
# (*+): else a long blank value with a bad byte behind it costs time in the square of its length.
_LINE = re.compile(
    rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*+"
    rb"((?:[\x21-\x7e\x80-\xff](?:[ \t\x21-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?)[ \t]*"
)
_HOST = re.compile(rb"[A-Za-z0-9\-._]+(?::\d{1,5})?")
_LENGTH = re.compile(rb"\d{1,19}")

# Fields that decide framing or the life of the connection. Those with a check here are plain when it says so;
# the others (transfer-encoding, upgrade, expect, te) are never plain.
_DECISIVE = frozenset(
    {b"host", b"connection", b"content-length", b"transfer-encoding", b"upgrade", b"expect", b"te"}
)
# Secrets have no business in a table that outlives their request.
_SECRET = frozenset({b"authorization", b"cookie", b"proxy-authorization", b"x-api-key", b"set-cookie"})

_CACHED_LINES = 512
_CACHED_LINE_BYTES = 256


class Recogniser:
    """Recognises plain request heads. One per worker, for its table of header lines seen before.

    Attributes:
        recognised, declined: how many heads it took and left to h11.
    """

    __slots__ = ("_lines", "_settings", "declined", "recognised")

    def __init__(self, settings: HttpSettings) -> None:
        self._settings = settings
        # Whole lines to checked pairs: a client repeats its lines, and a look-up is cheaper than a match.
        self._lines: dict[bytes, tuple[bytes, bytes]] = {}
        self.recognised = 0
        self.declined = 0

    def recognise_request(self, head: bytes) -> Request | None:
        """The request that a complete head (without its empty line) holds, or None when it is not plain."""
        request = self._recognise(head)
        if request is None:
            self.declined += 1
        else:
            self.recognised += 1
        return request

    def _recognise(self, head: bytes) -> Request | None:
        first, *lines = head.split(b"\r\n")
        settings = self._settings
        if (
            len(first) > settings.request_line_bytes
            or len(lines) > settings.header_count
            or len(head) - len(first) > settings.header_bytes
        ):
            return None
        match = _REQUEST_LINE.fullmatch(first)
        if match is None:
            return None
        headers: Headers = []
        decisive: Headers = []
        cached = self._lines
        for line in lines:
            pair = cached.get(line) or self._match_line(line)
            if pair is None:
                return None
            headers.append(pair)
            if pair[0] in _DECISIVE:
                decisive.append(pair)
        request = Request(match[1], match[2], match[3] or b"", "1.1", headers)
        return request if _apply_decisive(request, decisive) else None

    def _match_line(self, line: bytes) -> tuple[bytes, bytes] | None:
        match = _LINE.fullmatch(line)
        if match is None:
            return None
        pair = (match[1].lower(), match[2])
        if len(line) <= _CACHED_LINE_BYTES and pair[0] not in _SECRET:
            if len(self._lines) >= _CACHED_LINES:
                self._lines.clear()
            self._lines[line] = pair
        return pair


def _apply_decisive(request: Request, decisive: Headers) -> bool:
    """Read the fields that decide framing and keep-alive; False when one of them is not plain."""
    seen: set[bytes] = set()
    for name, value in decisive:
        if name in seen:
            return False
        seen.add(name)
        if name == b"host":
            if _HOST.fullmatch(value) is None:
                return False
        elif name == b"connection":
            option = value.lower()
            if option == b"close":
                request.keep_alive = False
            elif option != b"keep-alive":
                return False
        elif name == b"content-length":
            if _LENGTH.fullmatch(value) is None:
                return False
            if size := int(value):
                request.body, request.content_length = BodyKind.LENGTH, size
        else:
            return False
    return b"host" in seen
