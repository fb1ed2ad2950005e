"""Heads of requests, streams of requests, and responses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, NamedTuple, Self

import corpus_reader
from both_ways import (
    OURS,
    SETTINGS,
    SMALL,
    cut,
    plain_start,
    planned_response,
    planned_start,
    read_requests,
    strict_request,
)
from fuzz import Difference, Kind, less
from leanserve.errors import AppProtocolError
from leanserve.protocol.events import Request
from leanserve.protocol.fastpath import Recogniser, ResponseEncoder
from leanserve.protocol.http1 import Http1Codec
from leanserve.protocol.responses import REASONS, check_headers
from leanserve.settings import HttpSettings

__all__ = ["Heads", "Responses", "Streams", "cut_anywhere", "fewer", "flip_bit"]

_LIMITS = (SETTINGS, SMALL)
_RAW = [case.raw for case in corpus_reader.load() if len(case.raw) < 9000]
_CORPUS = sorted({part for raw in _RAW for part in raw.split(b"\r\n\r\n") if part})

_METHODS = [b"GET", b"POST", b"HEAD", b"PUT", b"DELETE", b"PATCH", b"OPTIONS"]
_ODD_METHODS = [b"BREW", b"CONNECT", b"get", b"G=T", b"", b"GET "]
_ODD_VERSIONS = [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.10", b"HTTP/0.9"]
_CONNECTION = [b"Connection: keep-alive", b"connection: Close", b"CONNECTION:keep-alive "]
_TARGETS = [
    *(b"/", b"/a/b", b"/a?b=c", b"/?", b"/%41/%zz", b"/a;b=c/'(d)!", b"//a", b"/..", b"/?a?b", b'/"x"'),
    *(b"/" + b"a" * 30, b"/search?q=" + b"%20word" * 9, b"/[a]{b}|c^d`e\\f"),
]
_ODD_TARGETS = [
    *(b"*", b"http://b.example/c", b"HTTPS://a:1?x", b"/a#b", b"/\xe4", b"a.example:80", b"", b"/ /"),
]
_HOSTS = [b"a.example", b"a.example:8000", b"127.0.0.1", b"localhost:80", b"a_b-c.d:65535", b"A"]
_ODD_HOSTS = [b"", b"[::1]:80", b"a:", b"a:123456", b"u@a", b"a b", b"a,b", b"\xe4", b"%41", b"a!$&'()*+;=~"]
_NAMES = [
    *(b"User-Agent", b"Accept", b"accept-encoding", b"Accept-Language", b"Referer", b"Cookie"),
    b"Authorization",
    *(b"X-Forwarded-For", b"X-Forwarded-Proto", b"If-None-Match", b"Cache-Control", b"sec-ch-ua"),
    *(b"X", b"DNT"),
    *(b"Content-Type", b"Origin", b"X-Request-ID", b"!#$%&'*+-.^_`|~0", b"Set-Cookie"),
    *(b"X-API-Key", b"Keep-Alive"),
]
_VALUES = [
    *(b"*/*", b"gzip, deflate, br", b"Mozilla/5.0 (X11; Linux x86_64) Gecko/20100101"),
    *(b"a=b; c=d", b"W/\"0\""),
    *(b"", b"1", b"Bearer abc.def", b"\xff\xfe", b"a\tb", b"203.0.113.7, 10.0.0.1", b"https"),
    b'"a";v="1"',
]
# Fields that decide something, well-formed and not.
_DECIDING = [
    *(b"Connection: keep-alive", b"connection:close", b"Connection: Keep-Alive, Upgrade", b"Connection: ,"),
    *(b"Connection: TE, close", b"Connection: close,keep-alive", b"connection: keep-alive,x", b"Connection:"),
    *(b"Content-Length: 0", b"Content-Length: 5", b"content-length:005"),
    *(b"Content-Length: 5, 5", b"Content-Length: +5", b"Content-Length:", b"Content-Length: 0x5"),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: Chunked", b"Transfer-Encoding: gzip, chunked"),
    *(b"Expect: 100-continue", b"TE: trailers", b"Upgrade: websocket", b"Upgrade: h2c", b"Host: b.example"),
    *(b"Host:", b"X-Forwarded-For: 10.0.0.1", b"Content_Length: 5", b"Content-Length : 5"),
    b" Content-Length: 5",
]
_TOKENS = [
    *(b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"\x00", b"\x0b", b"\x0c", b"\x1f", b"\x7f"),
    *(b"\x80", b"\x85"),
    *(b"\xa0", b"\xff", b",", b"#", b"?", b"/", b"\r\n ", b"\r\n\t", b"\r\n:", b"\r\n\r\n"),
    *(b" HTTP/1.1", b"%00"),
    *(b"HTTP/1.0", b"HTTP/1.1", b"HTTP/2.0", b"http/1.1", b"HTTP/1.1 ", b"CONNECT ", b"get "),
    *(b"*", b"http://a/"),
    *(b"\r\n" + line for line in _DECIDING),
]
_NUMBERS = [
    *(b"0", b"00", b"1", b"9" * 18, b"9" * 19, b"1" + b"0" * 19, b"9" * 20, b"9223372036854775807"),
    *(b"9223372036854775808", b"18446744073709551616", b"-1", b"1_0", b"1e3", b"\xd9\xa3"),
    *(b"65535", b"99999"),
]


_DIGITS = re.compile(rb"[0-9]+")


# Mutations: each gives other bytes back, or the same where there is nothing to do.


def _flip(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) or 1)
    return data[:at] + bytes((random.randrange(256),)) + data[at + 1 :]


def flip_bit(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) or 1)
    return data[:at] + bytes(byte ^ 1 << random.randrange(8) for byte in data[at : at + 1]) + data[at + 1 :]


def _insert(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.choice(_TOKENS) + data[at:]


def _insert_line(random: Random, data: bytes) -> bytes:
    lines = data.split(b"\r\n")
    lines.insert(random.randrange(len(lines)) + 1, random.choice(_DECIDING))
    return b"\r\n".join(lines)


def _set_visible(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) or 1)
    return data[:at] + bytes((random.randrange(0x21, 0x7F),)) + data[at + 1 :]


def _delete(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) or 1)
    return data[:at] + data[at + random.choice((1, 1, 2, 5, 20)) :]


def _delete_line(random: Random, data: bytes) -> bytes:
    lines = data.split(b"\r\n")
    del lines[random.randrange(len(lines))]
    return b"\r\n".join(lines)


def _double(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) or 1)
    end = at + random.choice((1, 2, 5, 20))
    return data[:end] + data[at:]


def _double_line(random: Random, data: bytes) -> bytes:
    lines = data.split(b"\r\n")
    lines.insert(random.randrange(len(lines)) + 1, random.choice(lines))
    return b"\r\n".join(lines)


def _swap_lines(random: Random, data: bytes) -> bytes:
    first, *lines = data.split(b"\r\n")
    random.shuffle(lines)
    return b"\r\n".join([first, *lines])


def _splice(random: Random, data: bytes) -> bytes:
    other = random.choice(_CORPUS)
    return data[: random.randrange(len(data) + 1)] + other[random.randrange(len(other)) :]


def _change_case(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) or 1)
    end = at + random.choice((1, 5, 20))
    return data[:at] + data[at:end].swapcase() + data[end:]


def _set_number(random: Random, data: bytes) -> bytes:
    """Put another number in place of one."""
    found = list(_DIGITS.finditer(data))
    if not found:
        return data
    start, end = random.choice(found).span()
    return data[:start] + random.choice(_NUMBERS) + data[end:]


_MUTATIONS: list[Callable[[Random, bytes], bytes]] = [
    *(_flip, flip_bit, _insert, _insert_line, _delete, _delete_line, _double, _double_line),
    *(_swap_lines, _splice, _change_case, _change_case, _set_number, _set_visible, _set_visible),
]


def mutate(random: Random, data: bytes, times: int) -> bytes:
    """Apply so many mutations."""
    for _ in range(times):
        data = random.choice(_MUTATIONS)(random, data)
    return data


def cut_anywhere(random: Random, data: bytes) -> tuple[bytes, ...]:
    """In one piece, in a few, or byte by byte."""
    way = random.random()
    if way < 0.3:
        return (data,)
    if way < 0.36 and len(data) < 400:
        return tuple(data[at : at + 1] for at in range(len(data)))
    return tuple(cut(data, [random.randrange(len(data) or 1) for _ in range(random.randrange(1, 6))]))


def fewer(pieces: tuple[bytes, ...], *, joined: bool = True) -> Iterator[tuple[bytes, ...]]:
    """Fewer pieces, then fewer bytes; `joined` when they are pieces of one whole."""
    if joined and len(pieces) > 1:
        yield (b"".join(pieces),)
        for at in range(len(pieces) - 1):
            yield (*pieces[:at], pieces[at] + pieces[at + 1], *pieces[at + 2 :])
    if len(pieces) > 1:
        for at in range(len(pieces)):
            yield pieces[:at] + pieces[at + 1 :]
    for at, piece in enumerate(pieces):
        for shorter in less(piece):
            yield (*pieces[:at], shorter, *pieces[at + 1 :])


# Heads


def make_head(random: Random, *, length: int | None = None) -> bytes:
    """A head that is plain, or has one thing about it that is not."""
    odd = random.random()
    method = random.choice(_METHODS if odd > 0.02 else _ODD_METHODS)
    version = b"HTTP/1.1" if not 0.02 < odd < 0.04 else random.choice(_ODD_VERSIONS)
    host = random.choice(_HOSTS if not 0.04 < odd < 0.06 else _ODD_HOSTS)
    target = random.choice(_TARGETS if odd < 0.97 else _ODD_TARGETS)
    lines = [b"Host: " + host]
    for _ in range(random.choice((0, 1, 2, 3, 5, 8))):
        lines.append(random.choice(_NAMES) + random.choice((b": ", b":", b":\t ")) + random.choice(_VALUES))
    if length is not None:
        lines.append(b"Content-Length: %d" % length)
    if random.random() < 0.2:
        lines.append(random.choice(_CONNECTION))
    if random.random() < 0.3:
        random.shuffle(lines)
    return b"\r\n".join([b"%b %b %b" % (method, target, version), *lines])


def _fill(random: Random, head: bytes, limits: HttpSettings) -> bytes:
    """Bring line, block or count of lines to a limit, or one to either side."""
    line, _, block = head.partition(b"\r\n")
    which, by = random.randrange(3), random.randrange(-2, 4)
    if which == 0:
        start, space, end = line.rpartition(b" ")
        return start + b"a" * (limits.request_line_bytes - len(line) + by) + space + end + b"\r\n" + block
    if which == 1:
        return head + b"\r\nX-Fill: " + b"b" * (limits.header_bytes - len(block) - 10 + by)
    return head + b"\r\nx:y" * (limits.header_count - block.count(b"\r\n") - 1 + by)


_RELATIVES: list[Callable[[Random, bytes], bytes]] = [
    lambda random, head: head.lower(),
    lambda random, head: head.partition(b"\r\n")[0] + b"\r\n" + head.partition(b"\r\n")[2].lower(),
    lambda random, head: head.partition(b"\r\n")[0] + b"\r\n" + head.partition(b"\r\n")[2].swapcase(),
    _set_visible,
    _swap_lines,
    _change_case,
]


class Head(NamedTuple):
    """Heads without their empty lines, one after the other, and which of the limits they meet."""

    heads: tuple[bytes, ...]
    small: bool


class Heads(Kind[Head]):
    """Whole heads, through the recogniser and through strict.py and h11."""

    name, number = "heads", 1

    def __init__(self, recogniser: Callable[[HttpSettings], Recogniser] = Recogniser) -> None:
        super().__init__()
        self.subject = recogniser
        self._recognisers = [recogniser(limits) for limits in _LIMITS]

    def make(self, random: Random) -> Head:
        small = random.random() < 0.15
        head = random.choice(_CORPUS) if random.random() < 0.15 else make_head(random)
        if random.random() < (0.5 if small else 0.001):
            head = _fill(random, head, _LIMITS[small])
        head = mutate(random, head, random.choice((0, 1, 1, 1, 1, 2, 3)))
        heads = [head]
        if random.random() < 0.1:
            heads.append(random.choice(_RELATIVES)(random, head))  # a table must not take one for the other
        # What the codec would look for is the end of the head.
        return Head(tuple((it + b"\r\n\r\n").partition(b"\r\n\r\n")[0] for it in heads), small)

    def compare(self, case: Head) -> None:
        for head in case.heads:
            self._compare(head, _LIMITS[case.small], self._recognisers[case.small])
        if len(case.heads) > 1 and strict_request(case.heads[0], _LIMITS[case.small]) is not None:
            taught = self.subject(_LIMITS[case.small])
            if taught.recognise_request(case.heads[0]) is not None:
                taught.learn_shape([line.partition(b":")[0] for line in case.heads[0].split(b"\r\n")[1:]])
                for head in case.heads:
                    self._compare(head, _LIMITS[case.small], taught)

    def _compare(self, head: bytes, limits: HttpSettings, recogniser: Recogniser) -> None:
        expected = strict_request(head, limits)
        if expected is None:
            self.refused += 1
        # Three times: unknown, seen, in the table.
        for turn in range(3):
            found = recogniser.recognise_request(head)
            if found is None:
                self.declined += 1
                return
            # A bytearray equals bytes, and is not the same.
            if found != expected or (turn == 1 and repr(found) != repr(expected)):
                raise Difference(found, expected)
        self.recognised += 1

    def anew(self) -> Self:
        return type(self)(self.subject)

    def smaller(self, case: Head) -> Iterator[Head]:
        for heads in fewer(case.heads, joined=False):
            if not any(b"\r\n\r\n" in head or head.endswith(b"\r\n") for head in heads):
                yield Head(heads, case.small)


# Streams of requests


class Stream(NamedTuple):
    """What a connection reads, read by read."""

    pieces: tuple[bytes, ...]


_CHUNKED = [
    *(b"5\r\nhello\r\n0\r\n\r\n", b"0\r\n\r\n", b"1\r\na\r\n2;x=y\r\nbc\r\n0\r\nX-T: 1\r\n\r\n"),
    b"A\r\n0123456789",
    *(b"5 \r\nhello\r\n00\r\n\r\n", b"5\nhello\n0\n\n", b"-1\r\n", b"3\r\nhello\r\n0\r\n\r\n"),
    b"0\r\nX\n\r\n",
]


_BODIES = [b"", b"a", b"hello", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\r\n\r\n", b"0\r\n\r\n"]


class Streams(Kind[Stream]):
    """Requests with bodies, one behind the other, cut anywhere: codecs with a recogniser and without."""

    name, number = "streams", 2

    def __init__(self, recogniser: Callable[[HttpSettings], Recogniser] = Recogniser) -> None:
        super().__init__()
        self.subject = recogniser
        self._recogniser = recogniser(SETTINGS)

    def make(self, random: Random) -> Stream:
        wire = b"".join(self._make_request(random) for _ in range(random.choice((1, 2, 2, 3, 5))))
        if random.random() < 0.4:
            wire = mutate(random, wire, random.choice((1, 1, 2)))
        return Stream(cut_anywhere(random, wire))

    def _make_request(self, random: Random) -> bytes:
        way = random.random()
        if way < 0.1:
            return random.choice(_RAW)
        if way < 0.5:
            return make_head(random) + b"\r\n\r\n"
        if way < 0.55:
            return b"\r\n" + make_head(random) + b"\r\n\r\n"
        if way < 0.65:
            return make_head(random) + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + random.choice(_CHUNKED)
        if way < 0.75:
            head = mutate(random, make_head(random, length=5), 1)
            return head + b"\r\n\r\nhello"
        body = random.choice(_BODIES)
        by = random.choice((0, 0, 0, 0, 0, 0, 1, -1))
        return make_head(random, length=max(len(body) + by, 0)) + b"\r\n\r\n" + body

    def compare(self, case: Stream) -> None:
        recogniser = self._recogniser
        strict = read_requests(case.pieces, Http1Codec(SETTINGS))
        before = recogniser.recognised, recogniser.declined
        fast = read_requests(case.pieces, Http1Codec(SETTINGS, recogniser))
        self.recognised += recogniser.recognised - before[0]
        self.declined += recogniser.declined - before[1]
        if strict and strict[-1] and type(strict[-1][-1]) is tuple:
            self.refused += 1
        if fast != strict:
            raise Difference(fast, strict)

    def anew(self) -> Self:
        return type(self)(self.subject)

    def smaller(self, case: Stream) -> Iterator[Stream]:
        return map(Stream, fewer(case.pieces))


# Responses


class Response(NamedTuple):
    """What an application sends, and what is known of the request.

    Attributes:
        once: the headers come as an iterator, which can be read once.
    """

    request: Request
    status: int
    headers: Any
    once: bool
    body: bytes
    close: bool


_OUT_NAMES: list[Any] = [
    *(b"content-type", b"content-type", b"content-length", b"set-cookie", b"cache-control", b"etag", b"vary"),
    *(b"location", b"x-a", b"x-b", b"x-request-id", b"access-control-allow-origin", b"!#$%&'*+-.^_`|~09az"),
]
_DECIDING_OUT: list[Any] = [
    *(b"Content-Length", b"Content-Type", b"connection", b"transfer-encoding", b"date", b"server", b"x-own"),
    *(b"Connection", b"trailer", b"upgrade", b"te", b"keep-alive", b"a b", b"", b"x:", b"\xe4"),
    *(b"x\r\n", b"x\n"),
    *("x-a", None, 5, bytearray(b"x-a"), memoryview(b"x-a"), b" x-a", b"x-a ", b"content-length "),
]
_OUT_VALUES: list[Any] = [
    *(b"text/plain", b"text/html; charset=utf-8", b"no-cache", b"a=b", b"1", b"5", b"\xe9", b"a\tb"),
]
_ODD_OUT_VALUES: list[Any] = [
    *(b"", b" ", b" a", b"a ", b"\ta", b"a\r\nb: c", b"a\x00", b"a\x7f", b"a\n", b"a\nb", b"a\rb", b"a\x00b"),
    *(b"close", b"keep-alive, x"),
    *("a", None, 5, bytearray(b"a"), memoryview(b"a"), b"chunked", b"Chunked", b"gzip", b"x" * 300),
]
_LENGTHS: list[Any] = [b"%d" % size for size in (0, 5, 5, 5, 5, 4, 6)] + [
    *(b"005", b" 5", b"5 ", b"+5", b"5, 5", b"", "5", 5, b"\xb2", b"0" * 17 + b"5"),
    *(b"0" * 18 + b"5", b"0" * 19 + b"5"),
    *(b"9" * 18, b"9" * 19, b"9" * 20, bytearray(b"5"), memoryview(b"5")),
]
_DECIDING_PAIRS = [
    *((b"connection", value) for value in (b"close", b"keep-alive", b"close, x", b"x", b"", b"Close")),
    *((b"transfer-encoding", value) for value in (b"chunked", b"Chunked", b"gzip", b"")),
    *((b"date", b"now"), (b"server", b"y"), (b"x-own", b"2"), (b"Content-Length", b"5")),
    (b"CONNECTION", b"close"),
]
_REQUESTS = [
    Request(method, b"/", b"", version, [(b"host", b"a")], keep_alive=keep)
    for method in (b"GET", b"GET", b"GET", b"POST", b"HEAD")
    for version in ("1.1", "1.1", "1.0")
    for keep in (True, False)
]
# The last of those that the encoder joins to the head, and the first that it does not.
_OUT_BODIES = [b"", b"a", b"\0\r\n\r\n", b"x" * 65_535, b"x" * 65_536]
_STATUSES = sorted(status for status in REASONS if status >= 200)


class Responses(Kind[Response]):
    """Whole responses, and the heads of those in pieces, encoded in one step and planned."""

    name, number = "responses", 3

    def __init__(self, encoder: Callable[[list[bytes]], ResponseEncoder] = ResponseEncoder) -> None:
        super().__init__()
        self.subject = encoder
        self._encoder = encoder([name for name, _ in OURS])

    def make(self, random: Random) -> Response:
        odd = random.random() < 0.4
        request = random.choice(_REQUESTS)
        way = random.random()
        status = 200 if way < 0.4 else random.choice(_STATUSES) if way < 0.95 else random.randrange(200, 1000)
        headers: Any = [self._make_pair(random, odd) for _ in range(random.choice((0, 1, 2, 2, 3, 5)))]
        if odd and random.random() < 0.1:
            headers += [(b"content-length", random.choice((b"4", b"5"))) for _ in range(2)]
        once = random.random() < 0.05
        if odd and not once and random.random() < 0.1:
            headers = random.choice((tuple(headers), None, 5, b"ab", {b"x-a": b"1"}, [[b"x-a", b"1"]]))
        # What close says includes what the request says: see ResponseEncoder.encode.
        close = not request.keep_alive or random.random() < 0.2
        body = random.choice(_OUT_BODIES) if random.random() < 0.5 else b"hello"
        return Response(request, status, headers, once, body, close)

    def _make_pair(self, random: Random, odd: bool) -> Any:
        if odd and random.random() < 0.1:
            return random.choice(_DECIDING_PAIRS)
        name = random.choice(_DECIDING_OUT if odd and random.random() < 0.2 else _OUT_NAMES)
        if name in (b"content-length", b"Content-Length"):
            return name, random.choice(_LENGTHS) if odd else b"5"
        if odd and random.random() < 0.2:
            value = random.choice(_ODD_OUT_VALUES)
            return random.choice(((name, value), (name, value), [name, value], (name,), (name, value, value)))
        if type(name) is bytes and random.random() < 0.1:
            return name, random.randbytes(random.randrange(4)) if odd else b"%d" % random.randrange(5000)
        return name, random.choice(_OUT_VALUES)

    def compare(self, case: Response) -> None:
        request, status, headers, once, body, close = case
        expected = planned_response(request, status, headers, body, close=close)
        if expected is None:
            self.refused += 1
        found = None
        if once:
            iterator = iter(headers)
            if self._encoder.check(iterator) is not None or list(iterator) != headers:
                raise Difference("an iterator was read", headers)
        for _ in range(2):  # a second time, when the lines are in the table
            plain = self._encoder.check(headers)
            if plain is None:
                break
            try:
                checked: Any = check_headers(headers)
            except AppProtocolError as error:
                checked = error
            if plain[2] != checked:
                raise Difference(plain[2], checked)
            found = self._encoder.encode(request, status, plain, body, OURS, close)
            if found is not None and found != expected:
                raise Difference(found, expected)
            start = plain_start(self._encoder, request, status, plain, close=close)
            if start is not None:
                expected_start = planned_start(request, status, headers, close=close)
                if start != expected_start:
                    raise Difference(start, expected_start)
        self.recognised += found is not None
        self.declined += found is None

    def anew(self) -> Self:
        return type(self)(self.subject)

    def smaller(self, case: Response) -> Iterator[Response]:
        if isinstance(case.headers, list):
            for at in range(len(case.headers)):
                yield case._replace(headers=case.headers[:at] + case.headers[at + 1 :])
        for body in less(case.body):
            yield case._replace(body=body)
