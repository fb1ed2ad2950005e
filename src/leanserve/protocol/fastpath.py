"""The plain case, recognised in front of h11 and of the planned response (docs/explain/fastpath.md).

A recogniser returns exactly what the strict way would return, or None. It never raises, never answers and
has no options; None costs nothing but the time of the strict way. Deleting this module leaves every other
test green.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from leanserve.protocol.events import FORWARDED, TIMED, BodyKind, Headers, Request, Upgrade
from leanserve.protocol.responses import (
    JOINED_BYTES,
    REASONS,
    DefaultHeaders,
    Framing,
    Numbered,
    ResponseHead,
)
from leanserve.settings import HttpSettings

__all__ = ["PlainHead", "Recogniser", "ResponseEncoder"]

# Methods and origin-form targets as browsers, clients and proxies send them; no fragment, nothing but ASCII.
_REQUEST_LINE = re.compile(
    rb"(GET|POST|HEAD|PUT|DELETE|PATCH|OPTIONS) "
    rb"(/[\x21\x22\x24-\x3e\x40-\x7e]*)(?:\?([\x21\x22\x24-\x7e]*))? HTTP/1\.1\r\n"
)
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
# RFC 9112 section 5: token ":" OWS value OWS; of control bytes a value has only HTAB; a line ends in CRLF.
_VISIBLE = bytes(byte for byte in range(256) if byte == 0x09 or (byte >= 0x20 and byte != 0x7F))
_AUTHORITY = re.compile(rb"[A-Za-z0-9\-._]+(?::\d{1,5})?")

# Kinds of fields: those from _HOST on decide framing or the life of the connection, and may be there once;
# secrets have no business in a table that outlives their request. Not an enum: a look-up in one costs as much
# as a call.
_OTHER, _FORWARDED, _TIMED, _SECRET, _HOST, _CONNECTION, _LENGTH, _NEVER_PLAIN = range(_KINDS_COUNT := 8)
_KINDS = {
    b"host": _HOST,
    b"connection": _CONNECTION,
    b"content-length": _LENGTH,
    **dict.fromkeys([b"transfer-encoding", b"upgrade", b"expect", b"te"], _NEVER_PLAIN),
    **dict.fromkeys(FORWARDED, _FORWARDED),
    **dict.fromkeys(TIMED, _TIMED),
}

# Parts of the names of fields with secrets: authorization, cookie, x-api-key, x-auth-token, ...; of the field
# that may hold what stands in a target (referer); and of targets.
_SECRET_WORDS = (
    b"auth", b"cookie", b"key", b"token", b"secret", b"session", b"pass", b"sig", b"credential", b"jwt",
    b"pwd", b"otp", b"ticket", b"saml", b"assert", b"oidc", b"cert", b"code", b"referer", b"invite", b"reset",
    b"nonce",
)  # fmt: skip
# What looks like one by itself: a long part of a path, or of a query, with digits in it. What is encoded
# cannot be looked at.
_SECRET_PART = re.compile(rb"%|(?=[^/?&=]*\d)[^/?&=]{16,}")
# The same for values as a pattern, where they have their usual form; and what the deciding fields may say.
_ANY_VALUE = rb"([\x21-\x7e\x80-\xff][\t\x20-\x7e\x80-\xff]*+)(?<![\t ])"
_VALUES = {
    _HOST: b"(" + _AUTHORITY.pattern + b")", _CONNECTION: b"(close|keep-alive)", _LENGTH: rb"(\d{1,19})",
}  # fmt: skip
_NO_FIELD = (b"(a line that is none)", _NEVER_PLAIN)
_OPTIONS = (b"keep-alive", b"", b"close")
_BODY, _NO_BODY, _NO_UPGRADE = BodyKind.LENGTH, BodyKind.NONE, Upgrade.NONE
_CACHED_HEADS: Final = 256
_SEEN_HEADS: Final = 1024
_CACHED_HEAD_BYTES: Final = 2048
_CACHED_NAMES: Final = 512
_CACHED_NAME_BYTES: Final = 64
# Shapes: of blocks that have none one in so many is looked at; names that come a second time within so
# many looks become a shape. To make one takes as long as ten requests: no peer can have us do it often.
_LOOK_EVERY: Final = 64
_LOOKS: Final = 32
_SHAPES: Final = 8
_SHAPE_FIELDS: Final = 32


#: headers, keep_alive, body, content_length, forwarded, timed and whether it has a secret: what stands behind
#: the first line.
_Block = tuple[Headers, bool, BodyKind, int, bool, bool, bool]


class _Shape:
    """The names of the fields of a plain header, in their order: a pattern that leaves only the values open.

    It takes a block if every value is in the form that nearly all have: not empty, one blank in front of it,
    none behind it.

    Args:
        fields: name as sent, name in lower case, and kind, for each line.
    """

    __slots__ = ("_connection", "_length", "_match", "_names", "_noted")

    def __init__(self, fields: Sequence[tuple[bytes, bytes, int]]) -> None:
        kinds = [kind for _, _, kind in fields]
        lines = [re.escape(sent) + b": " + _VALUES.get(kind, _ANY_VALUE) for sent, _, kind in fields]
        self._match = re.compile(b"\r\n".join(lines)).fullmatch
        self._names = [name for _, name, _ in fields]
        self._connection = kinds.index(_CONNECTION) if _CONNECTION in kinds else None
        self._length = kinds.index(_LENGTH) if _LENGTH in kinds else None
        self._noted = (_FORWARDED in kinds, _TIMED in kinds, _SECRET in kinds)

    def read(self, block: bytes) -> _Block | None:
        """What the block says if it has this shape."""
        match = self._match(block)
        if match is None:
            return None
        values = match.groups()
        size = 0 if self._length is None else int(values[self._length])
        keep_alive = self._connection is None or values[self._connection] != b"close"
        headers = [*zip(self._names, values)]  # noqa: B905 - a group per name; "strict" doubles it
        return headers, keep_alive, _BODY if size else _NO_BODY, size, *self._noted


class Recogniser:
    """Recognises plain request heads. One per worker, for its tables of heads and shapes seen before.

    Attributes:
        recognised, declined: how many heads it took and left to h11.
        why: what was not plain in the last one declined.
    """

    __slots__ = (
        "_heads", "_looked_at", "_names", "_seen", "_settings", "_shapes", "_unlooked", "declined",
        "recognised", "why",
    )  # fmt: skip

    def __init__(self, settings: HttpSettings) -> None:
        self._settings = settings
        # Whole heads: a client that asks for the same again sends the same bytes.
        self._heads: dict[bytes, Request] = {}
        self._seen: set[int] = set()
        # And names as sent to names in lower case: they are few even where every value is new.
        self._names: dict[bytes, tuple[bytes, int]] = {}
        # A client repeats its names where it does not repeat all. The last that fitted comes first.
        self._shapes: list[_Shape] = []
        self._looked_at: set[tuple[bytes, ...]] = set()
        self._unlooked = 0
        self.recognised = 0
        self.declined = 0
        self.why = ""

    def recognise_request(self, head: bytes) -> Request | None:
        """The request that a complete head (without its empty line) holds, or None when it is not plain.

        The same one for the same head: nobody changes a request.
        """
        request = self._heads.get(head) or self._read_head(head)
        if request is None:
            self.declined += 1
        else:
            self.recognised += 1
        return request

    def _read_head(self, head: bytes) -> Request | None:
        match = _REQUEST_LINE.match(head)
        if match is None or match.end() - 2 > self._settings.request_line_bytes:
            self.why = "the request line"
            return None
        block = self._read_block(head[match.end() :])
        if block is None:
            return None
        method, path, query = match.groups(b"")
        headers, keep_alive, body, length, forwarded, timed, secret = block
        # By position: names cost time.
        request = Request(
            method, path, query, "1.1", headers, keep_alive, body, length, False, _NO_UPGRADE, False,
            forwarded, timed,
        )  # fmt: skip
        if not secret:
            self._keep(head, request)
        return request

    def _read_block(self, block: bytes) -> _Block | None:
        """Check every line behind the first; the limits too: a head from the table has passed them."""
        if len(block) + 2 > self._settings.header_bytes:
            self._decline("the size of the header")
            return None
        shapes = self._shapes
        for shape in shapes:
            found = shape.read(block)
            if found is not None:
                if shape is not shapes[0]:
                    shapes.remove(shape)
                    shapes.insert(0, shape)
                return found
        return self._read_lines(block)

    def _read_lines(self, block: bytes) -> _Block | None:
        lines = block.split(b"\r\n")
        if len(lines) > self._settings.header_count:
            self._decline("the size of the header")
            return None
        if len(block.translate(None, _VISIBLE)) != 2 * len(lines) - 2:
            self._decline("a control byte, or a CR or LF that ends no line")
            return None
        headers: Headers = []
        noted = [b""] * _KINDS_COUNT
        names = self._names
        for line in lines:
            raw_name, colon, value = line.partition(b":")
            try:
                name, kind = names[raw_name] if colon else _NO_FIELD
            except KeyError:
                name, kind = self._learn(raw_name)
            value = value.strip(b" \t")
            headers.append((name, value))
            if kind:
                if kind == _NEVER_PLAIN or (kind >= _HOST and (noted[kind] or not value)):
                    self._decline(f"the field {name.decode()}")  # of the last three: twice, or empty
                    return None
                noted[kind] = value or b"-"
        if _AUTHORITY.fullmatch(noted[_HOST]) is None:
            self._decline("the field host")
            return None
        option, length = noted[_CONNECTION].lower(), noted[_LENGTH]
        if option not in _OPTIONS:
            self._decline("the field connection")
            return None
        if length and (not length.isdigit() or len(length) > 19):
            self._decline("the field content-length")
            return None
        size = int(length or 0)
        self._unlooked += 1
        if self._unlooked == _LOOK_EVERY:
            self._unlooked = 0
            self._look_at(lines)
        return (
            headers, option != b"close", _BODY if size else _NO_BODY, size, bool(noted[_FORWARDED]),
            bool(noted[_TIMED]), bool(noted[_SECRET]),
        )  # fmt: skip

    def _decline(self, why: str) -> None:
        self.why = why

    def _keep(self, head: bytes, request: Request) -> None:
        """Keep what is seen a second time; heads that differ with every request would push the others out."""
        if len(head) > _CACHED_HEAD_BYTES:
            return
        number = hash(head)
        if number not in self._seen:
            if len(self._seen) >= _SEEN_HEADS:
                self._seen.clear()
            self._seen.add(number)
            return
        target = b"%b?%b" % (request.raw_path.lower(), request.query.lower())
        if _SECRET_PART.search(target) or any(word in target for word in _SECRET_WORDS):
            return
        if len(self._heads) >= _CACHED_HEADS:
            self._heads.clear()
        self._heads[head] = request

    def _look_at(self, lines: Sequence[bytes]) -> None:
        """Learn the shape of a plain block when its names come again."""
        sent = tuple(line.partition(b":")[0] for line in lines)
        if len(sent) > _SHAPE_FIELDS or any(name not in self._names for name in sent):
            return
        if sent in self._looked_at:
            self._looked_at.discard(sent)
            self.learn_shape(sent)
        elif len(self._looked_at) < _LOOKS:
            self._looked_at.add(sent)
        else:
            self._looked_at.clear()

    def learn_shape(self, sent: Sequence[bytes]) -> None:
        """From now on read blocks that have these names, as sent, in one step; a plain block has had them."""
        self._shapes.insert(0, _Shape([(name, *self._learn(name)) for name in sent]))
        del self._shapes[_SHAPES:]

    def _learn(self, raw_name: bytes) -> tuple[bytes, int]:
        if _NAME.fullmatch(raw_name) is None:
            return _NO_FIELD
        name = raw_name.lower()
        kind = _KINDS.get(name, _OTHER)
        if not kind and any(word in name for word in _SECRET_WORDS):
            kind = _SECRET
        found = (name, kind)
        if len(raw_name) <= _CACHED_NAME_BYTES:
            if len(self._names) >= _CACHED_NAMES:
                self._names.clear()
            self._names[raw_name] = found
        return found


# As the strict way leaves them: names in lower case, values without blanks around them; none are empty.
_PLAIN_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_PLAIN_VALUE = re.compile(rb"[\x21-\x7e\x80-\xff](?:[ \t\x21-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?")
_OURS = frozenset({b"connection", b"content-length", b"transfer-encoding", b"date", b"server"})
# 204, 205 and 304 have no content: the planned way knows what that means.
_STATUS_LINES = {
    status: b"HTTP/1.1 %d %b\r\n" % (status, reason)
    for status, reason in REASONS.items()
    if status >= 200 and status not in (204, 205, 304)
}
# Fields that say the same to many clients. What others say may be meant for one of them (a cookie, a token, a
# location with a signature) and is not kept.
_SAME_FOR_ALL = frozenset(
    {
        b"accept-ranges",
        b"access-control-allow-credentials",
        b"access-control-allow-headers",
        b"access-control-allow-methods",
        b"access-control-allow-origin",
        b"access-control-expose-headers",
        b"allow",
        b"cache-control",
        b"content-encoding",
        b"content-language",
        b"content-security-policy",
        b"content-type",
        b"cross-origin-opener-policy",
        b"cross-origin-resource-policy",
        b"permissions-policy",
        b"referrer-policy",
        b"strict-transport-security",
        b"vary",
        b"x-content-type-options",
        b"x-frame-options",
    }
)
# The end of a plain head, by the length of its body; the second where the connection closes behind it.
_END = Numbered(b"content-length: %d\r\n\r\n")
_LAST_END = Numbered(b"content-length: %d\r\nconnection: close\r\n\r\n")
_CHUNKED_END = b"transfer-encoding: chunked\r\n\r\n"
_LAST_CHUNKED_END = b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
_CACHED_LINES: Final = 512
_CACHED_LINE_BYTES: Final = 256

#: The headers of a plain response, checked: the lines of all but content-length; the length that the
#: application declared, or -1; all of them as ``responses.check_headers`` would have given them back.
PlainHead = tuple[list[bytes], int, Headers]


class ResponseEncoder:
    """Encodes plain responses. One per worker, for its table of header lines seen before.

    Plain is a final response to HTTP/1.1 that has a body, whose headers leave framing, connection, date and
    server to us.
    """

    __slots__ = ("_lines", "_ours")

    def __init__(self, names: Iterable[bytes]) -> None:
        self._lines: dict[tuple[bytes, bytes], bytes] = {}
        #: Names that an application may set in place of ours, or that decide something.
        self._ours = _OURS.union(names)

    def check(self, headers: object) -> PlainHead | None:
        """What `headers` of an application come to; None when one of them is not plain (or not valid)."""
        if type(headers) is not list and type(headers) is not tuple:
            return None  # an iterator can be read only once
        lines: list[bytes] = []
        length = -1
        known = self._lines
        try:
            for pair in headers:
                line = known.get(pair)
                if line is None:
                    name, value = pair
                    if name == b"content-length" and length < 0:
                        if type(value) is not bytes or not value.isdigit() or len(value) > 18:
                            return None
                        length = int(value)
                        continue
                    line = self._make_line(name, value)
                    if line is None:
                        return None
                lines.append(line)
        except (TypeError, ValueError):
            return None
        return lines, length, list(headers)

    def _make_line(self, name: object, value: object) -> bytes | None:
        if type(name) is not bytes or type(value) is not bytes:
            return None
        if name in self._ours or _PLAIN_NAME.fullmatch(name) is None or _PLAIN_VALUE.fullmatch(value) is None:
            return None
        line = b"%b: %b\r\n" % (name, value)
        if len(line) <= _CACHED_LINE_BYTES and name in _SAME_FOR_ALL:
            if len(self._lines) >= _CACHED_LINES:
                self._lines.clear()
            self._lines[name, value] = line
        return line

    def encode(
        self,
        request: Request,
        status: int,
        plain: PlainHead,
        body: bytes,
        ours: DefaultHeaders,
        close: bool,
    ) -> bytes | None:
        """A response whose whole body is at hand as bytes, or None when it is not plain.

        Args:
            request: what is answered; all of it has been read.
            status: 200 to 999.
            plain: what :meth:`check` made of the application's headers.
            body: all of it.
            ours: added in front of content-length.
            close: the connection closes behind the response.
        """
        lines, length, _ = plain
        size = len(body)
        start = _STATUS_LINES.get(status)
        if start is None or (length != size and length >= 0) or request.version != "1.1":
            return None
        if size >= JOINED_BYTES:
            return None  # which is not joined to its head
        if request.method == b"HEAD":
            return None
        end = _LAST_END[size] if close else _END[size]
        return b"".join([start, *lines, ours.block, end, body])

    def encode_start(
        self, request: Request, status: int, plain: PlainHead, ours: DefaultHeaders, close: bool
    ) -> tuple[bytes, ResponseHead] | None:
        """The head of a response whose body comes in pieces as bytes, and what it says of them; None when it
        is not plain. Arguments are those of :meth:`encode`, but the request need not have been read."""
        lines, length, _ = plain
        start = _STATUS_LINES.get(status)
        if start is None or request.version != "1.1" or request.method == b"HEAD":
            return None
        if length >= 0:
            framing, end = Framing.LENGTH, _LAST_END[length] if close else _END[length]
        else:
            framing, end = Framing.CHUNKED, _LAST_CHUNKED_END if close else _CHUNKED_END
        head = ResponseHead(status, [], framing, close, max(length, 0))
        return b"".join([start, *lines, ours.block, end]), head
