"""Reading what a server has written, strictly: one response after the other, nothing left over."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [\x20-\x7e]*")
_FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*")


@dataclass
class Response:
    """One response; `complete` is False when the bytes end before it does."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""
    trailers: list[tuple[bytes, bytes]] = field(default_factory=list)
    complete: bool = False
    interim: list[int] = field(default_factory=list)

    def get(self, name: bytes) -> bytes | None:
        """The value of a header that is there at most once."""
        values = [value for key, value in self.headers if key == name]
        assert len(values) <= 1, self.headers
        return values[0] if values else None

    @property
    def closes(self) -> bool:
        """Whether it says that the connection closes."""
        values = [value.lower() for key, value in self.headers if key == b"connection"]
        return any(b"close" in value.split(b", ") for value in values)


def _fields(block: bytes) -> list[tuple[bytes, bytes]]:
    found = []
    for line in block.split(b"\r\n"):
        match = _FIELD.fullmatch(line)
        assert match is not None, line
        found.append((match[1].lower(), match[2]))
    return found


def _head(data: bytes) -> tuple[Response, bytes] | None:
    head, end, rest = data.partition(b"\r\n\r\n")
    if not end:
        return None
    line, _, block = head.partition(b"\r\n")
    match = _STATUS.fullmatch(line)
    assert match is not None, data[:200]
    return Response(int(match[1]), _fields(block) if block else []), rest


def _chunked(response: Response, data: bytes) -> bytes:
    while True:
        line, end, rest = data.partition(b"\r\n")
        if not end:
            return b""
        size = int(line, 16)
        if size == 0:
            block, end, after = rest.partition(b"\r\n\r\n")
            if rest.startswith(b"\r\n"):
                response.complete = True
                return rest[2:]
            if end:
                response.trailers, response.complete = _fields(block), True
            return after
        response.body += rest[:size]
        if len(rest) < size + 2:
            return b""
        assert rest[size : size + 2] == b"\r\n", rest[size : size + 20]
        data = rest[size + 2 :]


def _body(response: Response, method: bytes, data: bytes, ended: bool) -> bytes:
    length, coding = response.get(b"content-length"), response.get(b"transfer-encoding")
    assert length is None or coding is None, response.headers
    if method == b"HEAD" or response.status in (204, 304):
        response.complete = True
        return data
    if coding is not None:
        assert coding == b"chunked"
        return _chunked(response, data)
    if length is not None:
        size = int(length)
        response.body, rest = data[:size], data[size:]
        response.complete = len(response.body) == size
        return rest
    assert response.closes, response.headers
    response.body, response.complete = data, ended
    return b""


def parse(data: bytes, methods: Iterable[bytes], *, ended: bool = False) -> list[Response]:
    """Responses to requests with these methods, the last one perhaps cut.

    Raises:
        AssertionError: the bytes are not that, or more than that.
    """
    responses, interim = [], []
    todo = list(methods)
    while data:
        found = _head(data)
        if found is None:
            break
        response, data = found
        if response.status < 200:
            interim.append(response.status)
            continue
        assert todo, f"a response too many: {response}"
        data = _body(response, todo.pop(0), data, ended)
        response.interim, interim = interim, []
        responses.append(response)
        if not response.complete or response.closes:
            assert not data, f"bytes behind the end: {data[:80]!r}"
            assert not responses[-1].closes or response is responses[-1]
    return responses
