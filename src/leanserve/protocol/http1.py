"""The server's side of one HTTP/1.1 connection as bytes and events, on h11.

h11 is the authority on requests; strict.py stands in front of it, and fastpath.py in front of both takes the
plain case. Each exchange starts in one or the other and stays there: an exchange that is not plain has an h11
connection of its own, which is only ever given bytes of that one message. The rest waits here until
:meth:`Http1Codec.next_exchange`, so a pipelined request is not looked at before its turn has come. What is a
matter of counting (a body of declared length) is counted here; h11 would copy it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from leanserve.errors import RemoteProtocolError
from leanserve.protocol import fastpath, responses, strict
from leanserve.protocol.events import BodyKind, Data, EndOfBody, Request
from leanserve.protocol.responses import Framing, ResponseHead
from leanserve.settings import HttpSettings

if TYPE_CHECKING:
    from leanserve.protocol.reader import StrictReader

__all__ = ["FileRange", "Http1Codec"]


# A look-up in an enum class costs as much as a call.
_CHUNKED = BodyKind.CHUNKED

# So little is copied sooner than made a bytearray, and copied again for each small request in it.
_COPIED_BYTES = 8192


class FileRange:
    """Stands for the first `count` bytes of a file in a list of pieces to write."""

    __slots__ = ("count",)

    def __init__(self, count: int) -> None:
        self.count = count


class Http1Codec:
    """Bytes in, events out; responses in, bytes out. One per connection; exchanges share no state."""

    __slots__ = (
        "_left",
        "_reader",
        "_recogniser",
        "_scanned",
        "_settings",
        "buffer",
        "eof",
        "request",
        "request_ended",
        "response",
    )

    def __init__(self, settings: HttpSettings, recogniser: fastpath.Recogniser | None = None) -> None:
        self._settings = settings
        self._recogniser = recogniser
        #: Bytes received and not yet made into an event.
        self.buffer: bytes | bytearray = b""
        self._scanned = 0
        self._reader: StrictReader | None = None  # of an exchange that is not plain
        self._left = 0
        #: The peer has sent its last byte.
        self.eof = False
        #: The request of this exchange, once its head is complete.
        self.request: Request | None = None
        #: Whether it has been read to its end.
        self.request_ended = False
        #: The head of the final response, once it is encoded.
        self.response: ResponseHead | None = None

    # Receiving

    def receive(self, data: bytes) -> None:
        """Add bytes from the peer."""
        buffer = self.buffer
        if not buffer:
            self.buffer = data  # most reads are used up before the next one, without a copy
        else:
            buffer = bytearray(buffer) if isinstance(buffer, bytes) else buffer
            buffer += data
            self.buffer = buffer

    def next_event(self) -> Request | Data | EndOfBody | None:
        """The next event, or None when more bytes (or :meth:`next_exchange`) are needed first.

        A request without a body is complete with its head: no EndOfBody follows.

        Raises:
            RemoteProtocolError: the peer broke the protocol; nothing more is read from it.
        """
        if self.request is not None:
            return None if self.request_ended else self._read_body(self.request)
        buffer = self.buffer
        if self._scanned:
            end = buffer.find(b"\r\n\r\n", max(self._scanned - 3, 0))
        else:
            if buffer.startswith(b"\r\n"):
                # RFC 9112 section 2.2: "SHOULD ignore at least one empty line (CRLF) received prior to the
                # request-line".
                self._drop(2)
                buffer = self.buffer
                self._scanned = 1  # one only; and 1 is as good a place as 0 to search from
            end = buffer.find(b"\r\n\r\n")
        if end < 0:
            strict.check_partial_head(buffer, self._settings, self._scanned)
            if buffer != b"\r":  # which may yet be half of that empty line
                self._scanned = max(len(buffer), self._scanned)
            return None
        head = buffer[:end] if type(buffer) is bytes else bytes(buffer[:end])
        request = None if self._recogniser is None else self._recogniser.recognise_request(head)
        if request is None:
            request = self._read_strictly(head)
        if end + 4 == len(buffer):
            self.buffer = b""
        else:
            self._drop(end + 4)
        self._scanned = 0
        self.request = request
        if not request.body:
            self.request_ended = True
        else:
            self._begin_body(request)
        return request

    def _begin_body(self, request: Request) -> None:
        limit = self._settings.max_body_size
        self._left = request.content_length or 0
        if limit is not None and self._left > limit:
            # RFC 9110 section 15.5.14. Before the body is read, or asked for with 100 (Continue).
            raise RemoteProtocolError(f"announced body larger than max_body_size, {limit}", status=413)

    def take_rest(self) -> bytes:
        """Hand over the bytes behind the head of an upgraded request; they are another protocol's."""
        return self._take(len(self.buffer))

    def _take(self, size: int) -> bytes:
        """The first `size` bytes; copied only where more stay behind."""
        buffer = self.buffer
        if size == len(buffer):
            self.buffer = b""
            return bytes(buffer)
        taken = bytes(buffer[:size])
        self._drop(size)
        return taken

    def _drop(self, size: int) -> None:
        buffer = self.buffer
        if size == len(buffer):
            self.buffer = b""
        elif type(buffer) is bytes and len(buffer) <= _COPIED_BYTES:
            self.buffer = buffer[size:]
        else:
            # A bytearray gives up its beginning without moving the rest: many small requests in one read.
            buffer = bytearray(buffer) if isinstance(buffer, bytes) else buffer
            del buffer[:size]
            self.buffer = buffer

    def _read_strictly(self, head: bytes) -> Request:
        from leanserve.protocol.reader import StrictReader  # and h11

        self._reader = StrictReader(self._settings)
        return self._reader.read_head(head)

    def _read_body(self, request: Request) -> Data | EndOfBody | None:
        if request.body is _CHUNKED:
            return self._read_chunked()
        if not self._left:
            self.request_ended = True
            return EndOfBody()
        if not self.buffer:
            return None
        data = self._take(min(len(self.buffer), self._left))
        self._left -= len(data)
        return Data(data)

    def _read_chunked(self) -> Data | EndOfBody | None:
        reader = self._reader
        assert reader is not None
        event = reader.read_body(b"")
        while event is None and self.buffer:
            event = reader.read_body(self._take(reader.measure(self.buffer)))
        if type(event) is EndOfBody:
            self.request_ended = True
        return event

    # Sending

    def encode_response(self, *args: Any, **kwargs: Any) -> bytes:
        """As :meth:`encode_response_pieces`, joined."""
        return b"".join(self.encode_response_pieces(*args, **kwargs))

    def encode_response_pieces(
        self,
        status: int,
        headers: Iterable[tuple[bytes, bytes]],
        defaults: Iterable[tuple[bytes, bytes]],
        body: bytes,
        *,
        more: bool,
        close: bool,
        trailers: bool = False,
    ) -> list[bytes]:
        """Head and first piece of the body of the final response, which is not copied.

        Args:
            status: 200 to 599.
            headers: the application's, as ``responses.check_headers`` gave them back.
            defaults: headers added where the application has none of that name (date, server).
            body: the first piece; dropped where the response may have none (HEAD, 204, 205, 304).
            more: whether more pieces follow; without, a length is declared instead of chunking.
            close: whether this is to be the last exchange of the connection.
            trailers: whether trailers may follow.

        Raises:
            AppProtocolError: a header or status that HTTP does not allow; nothing has been encoded. A body
                that is not as long as declared does not raise: it is cut and noted in ``response.fault``.
        """
        request = self.request
        assert request is not None
        known = None if more or trailers else len(body)
        head = responses.plan_response(request, status, headers, defaults, known_length=known, close=close)
        self.response = head
        return [responses.encode_head(head), *self.encode_pieces(body, more=more or trailers)]

    def encode_body(self, data: bytes, *, more: bool) -> bytes:
        """As :meth:`encode_pieces`, joined."""
        return b"".join(self.encode_pieces(data, more=more))

    def encode_file(self, count: int) -> list[bytes | FileRange]:
        """The rest of the body, all of it from a file: a FileRange stands where its bytes go.

        The head has declared a length: a file has one.
        """
        head = self.response
        assert head is not None
        size = head.admit(count) if head.framing is Framing.LENGTH else 0
        head.check_complete()
        return [FileRange(size)] if size else []

    def encode_pieces(self, data: bytes, *, more: bool) -> list[bytes]:
        """A piece of the body, which is not copied; the end of the message too unless `more`."""
        head = self.response
        assert head is not None
        pieces: list[bytes] = []
        if data and head.framing is not Framing.NONE:
            size = head.admit(len(data))
            if head.framing is Framing.CHUNKED:
                pieces = responses.encode_chunk(data)
            elif size:
                pieces = [data if size == len(data) else data[:size]]
        if not more:
            pieces += self._end(())
        return pieces

    def encode_trailers(self, trailers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """The end with trailers; dropped where they cannot go (RFC 9110 section 6.5.1)."""
        assert self.request is not None
        return b"".join(self._end(trailers if self.request.accepts_trailers else ()))

    def _end(self, trailers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
        assert self.response is not None
        # A body that is too short gets no fake end: the connection is cut, and the client sees the gap.
        if not self.response.check_complete() or self.response.framing is not Framing.CHUNKED:
            return []
        return responses.encode_last_chunk(trailers)

    # Between exchanges

    def next_exchange(self) -> None:
        """Forget the finished exchange; the next call of :meth:`next_event` reads a new head."""
        self._reader = None
        self.request = None
        self.request_ended = False
        self.response = None
