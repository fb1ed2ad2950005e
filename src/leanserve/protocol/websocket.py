"""The server's side of one open WebSocket as bytes and events (RFC 6455 sections 5 to 7), on wsproto.

wsproto knows frames; here they become whole messages within bounds. fastframes.py in front of it takes plain
ones. One call of ``next_event`` deals with one frame (or one piece of a long one), so the caller decides how
much work is done before others have their turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, Final

from wsproto.extensions import Extension
from wsproto.frame_protocol import (
    CloseReason,
    Frame,
    FrameDecoder,
    FrameProtocol,
    Opcode,
    ParseFailed,
    RsvBits,
)

from leanserve.errors import AppProtocolError, RemoteProtocolError
from leanserve.protocol.deflate import BoundedDeflate
from leanserve.protocol.responses import JOINED_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from leanserve.protocol.fastframes import FrameRecogniser, PartFrame

__all__ = [
    "Close",
    "CloseCode",
    "Partial",
    "Ping",
    "Pong",
    "WebSocketCodec",
    "WebSocketEvent",
]

# How much wsproto is given at a time: a bound on the work of one call. Deflate can make a thousandfold of it.
_SLICE_BYTES: Final = 65536
_COMPRESSED_SLICE_BYTES: Final = 2048

# Fragments of this size are not counted: long messages in small honest pieces are no flood.
_FREE_FRAGMENT_BYTES: Final = 64

# Bytes of the shortest and the longest header that a client may send: with its masking key.
_SHORT_HEADER: Final = 6
_LONG_HEADER: Final = 14

# What stands in front of short messages of ours: FIN and the opcode, the length.
_TEXT_HEADS: Final = [bytes((0x80 | Opcode.TEXT, size)) for size in range(126)]
_BINARY_HEADS: Final = [bytes((0x80 | Opcode.BINARY, size)) for size in range(126)]
_HEAD_16: Final = Struct("!BBH")
_HEAD_64: Final = Struct("!BBQ")

_NO_RSV: Final = RsvBits(False, False, False)


class CloseCode(IntEnum):
    """Close codes that the server itself uses (RFC 6455 section 7.4.1 and the IANA registry)."""

    NORMAL = 1000
    PROTOCOL_ERROR = 1002
    NO_CODE = 1005
    ABNORMAL = 1006
    INVALID_DATA = 1007
    TOO_BIG = 1009
    INTERNAL_ERROR = 1011
    SERVICE_RESTART = 1012


@dataclass(slots=True)
class Ping:
    """A ping; it wants a pong with the same payload."""

    payload: bytes


@dataclass(slots=True)
class Pong:
    """A pong, asked for or not."""

    payload: bytes


@dataclass(slots=True)
class Close:
    """The peer's Close; it is the last event. Without a code in the frame, `code` is 1005."""

    code: int
    reason: str


@dataclass(slots=True)
class Partial:
    """A piece of a message was taken in, and nothing is complete yet: call again."""


#: A text message is its str and a binary message its bytes: there are many of them.
WebSocketEvent = str | bytes | Ping | Pong | Close | Partial
_PARTIAL: Final = Partial()


class _Bounds(Extension):
    """Looks at each frame header before wsproto takes the payload.

    wsproto may offer one header several times while its masking key is incomplete, so looking changes nothing
    that a second look would change again; a frame is counted when it is complete.
    """

    name = "bounds"

    def __init__(self, max_size_bytes: int, max_fragments: int) -> None:
        self._max_size_bytes = max_size_bytes
        self._max_fragments = max_fragments
        self._fragments = 0
        self._limit_bytes = 0
        self._message_bytes = 0
        self._frame_bytes: int | None = None
        self._in_control = False
        #: What wsproto has been given of the frame under way, if it is given one frame at a time.
        self.fed_bytes = 0

    def enabled(self) -> bool:
        return True

    def offer(self) -> bool | str:
        return False  # nothing is negotiated: this extension exists on our side only

    @property
    def between_messages(self) -> bool:
        """Whether the last frame ended a message, or stood between two."""
        return not self._fragments and self._frame_bytes is None

    @property
    def missing_bytes(self) -> int:
        """How much of the frame under way wsproto has not been given; or less, while that is unknown."""
        size = self._frame_bytes
        if size is None:
            return (_SHORT_HEADER if self.fed_bytes < _SHORT_HEADER else _LONG_HEADER) - self.fed_bytes
        return _SHORT_HEADER + (0 if size < 126 else 2 if size < 65536 else 8) + size - self.fed_bytes

    def frame_inbound_header(
        self, proto: FrameDecoder | FrameProtocol, opcode: Opcode, rsv: RsvBits, payload_length: int
    ) -> CloseReason | RsvBits:
        self._frame_bytes = payload_length
        self._in_control = opcode.iscontrol()
        if self._in_control:
            return _NO_RSV
        # RFC 6455 section 5.4: fragments of one message must not be interleaved with another message.
        if (opcode is Opcode.CONTINUATION) != (self._fragments > 0):
            return CloseReason.PROTOCOL_ERROR
        if not self._fragments:
            self._message_bytes = 0
            self._limit_bytes = self._max_size_bytes
            if rsv.rsv1:
                # What counts is the inflated size, which BoundedDeflate watches. Data that does not compress
                # becomes a little longer, so the limit on the compressed size has to be a little higher.
                self._limit_bytes += self._max_size_bytes // 8 + 64
        most = self._max_fragments + self._message_bytes // _FREE_FRAGMENT_BYTES
        if payload_length > self._limit_bytes - self._message_bytes or self._fragments >= most:
            return CloseReason.MESSAGE_TOO_BIG
        return _NO_RSV

    def frame_inbound_complete(
        self, proto: FrameDecoder | FrameProtocol, fin: bool
    ) -> bytes | CloseReason | None:
        if not self._in_control:
            assert self._frame_bytes is not None
            self._message_bytes += self._frame_bytes
            self._fragments = 0 if fin else self._fragments + 1
        self._frame_bytes = None
        self.fed_bytes = 0
        return None


class WebSocketCodec:
    """One per connection.

    Args:
        max_size_bytes: most bytes of one message, inflated; beyond it RemoteProtocolError, close code 1009.
        max_fragments: most frames of one message, besides one for each 64 bytes; beyond it the same.
        deflate: the compression agreed on, or None.
        recogniser: what takes plain frames in front of wsproto, or None.
    """

    __slots__ = (
        "_at", "_bounds", "_close_sent", "_compressed", "_ended", "_frames", "_max_size_bytes", "_part",
        "_partial", "_pending", "_recogniser", "_returned", "_slice_bytes", "_strict",
    )  # fmt: skip

    def __init__(
        self, *, max_size_bytes: int, max_fragments: int, deflate: BoundedDeflate | None = None,
        recogniser: FrameRecogniser | None = None,
    ) -> None:  # fmt: skip
        self._bounds = _Bounds(max_size_bytes, max_fragments)
        extensions: list[Extension] = [self._bounds]
        if deflate is not None:
            extensions.append(deflate)
        self._frames = FrameProtocol(client=False, extensions=extensions)
        self._slice_bytes = _SLICE_BYTES if deflate is None else _COMPRESSED_SLICE_BYTES
        self._compressed = deflate is not None
        self._max_size_bytes = max_size_bytes
        self._recogniser = recogniser
        # Whether wsproto has the frame under way. Never half: it gives a message back to nobody.
        self._strict = recogniser is None
        self._part: PartFrame | None = None
        # The beginning of a frame that was not plain after all; what is pending stands behind it.
        self._returned: Iterator[bytes] | None = None
        # What has been received, dealt with up to _at, and empty when that is the end. Mostly it is one read,
        # which need not be copied.
        self._pending: bytes | bytearray = b""
        self._at = 0
        # No list of pieces: a long message that comes byte by byte must not cost fifty times its size.
        self._partial: bytearray | None = None
        self._ended = False
        self._close_sent = False

    # Receiving

    def receive(self, data: bytes) -> None:
        """Add bytes from the peer. Those behind its Close or a fault are dropped."""
        if self._ended:
            return
        if not self._pending:
            self._pending = data
        else:
            if isinstance(self._pending, bytes):
                self._pending = bytearray(self._pending)
            del self._pending[: self._at]
            self._at = 0
            self._pending += data

    def receive_message(self, data: bytes) -> str | bytes | None:
        """Add bytes from the peer; the message, when they are one plain frame and nothing else is under way.

        Most reads are that: this is :meth:`receive` and :meth:`next_event` in one step. None says nothing
        about what next_event will find.
        """
        if self._strict or self._pending or self._part is not None or self._ended or not data:
            self.receive(data)
            return None
        self._pending = data
        return self._recognise()

    @property
    def pending_bytes(self) -> int:
        """Bytes received and not yet looked at."""
        return len(self._pending) - self._at

    @property
    def drained(self) -> bool:
        """Whether there is certainly no further event before more bytes arrive."""
        return not self._pending and not self._strict

    def next_event(self) -> WebSocketEvent | None:
        """The next event, or None when more bytes are needed, and after Close or an error.

        Raises:
            RemoteProtocolError: the peer broke the protocol; its close_code is the one to close with.
        """
        if not self._strict:
            if not self._pending:
                return None
            message = self._recognise() if self._part is None else self._complete(self._part)
            if not self._strict:
                return message
        frame = self._next_frame()
        while frame is None and (self._pending or self._returned is not None) and not self._ended:
            self._frames.receive_bytes(self._take(self._slice_bytes))
            frame = self._next_frame()
        return None if frame is None else self._to_event(frame)

    def _take(self, most: int) -> bytes:
        """Bytes for wsproto: at most so many, and none of the next frame, which may be plain again."""
        if self._returned is not None:
            piece = next(self._returned, b"")
            if piece:
                self._bounds.fed_bytes += len(piece)
                return piece
            self._returned = None
        if self._recogniser is not None:
            most = min(most, self._bounds.missing_bytes)
        piece = bytes(self._pending[self._at : self._at + most])
        self._bounds.fed_bytes += len(piece)
        self._go_on(len(piece))
        return piece

    def _go_on(self, count: int) -> None:
        """So much more has been dealt with."""
        self._at += count
        if self._at == len(self._pending):
            self._pending, self._at = b"", 0

    def _recognise(self) -> str | bytes | None:
        """The next message, if it is plain. None: it is wsproto's, if that is `_strict`, or not all here."""
        assert self._recogniser is not None
        found = self._recogniser.recognise_frame(self._pending, self._at, self._max_size_bytes)
        if found is None:
            self._strict = True
            return None
        message, count = found
        if count == len(self._pending):
            self._pending = b""  # the usual case, by itself for speed
        elif not count:
            self._pending, self._at = self._pending[self._at :], 0  # a few bytes must not hold a long read
            return None
        else:
            self._go_on(count)
        if type(message) is bytes or type(message) is str:
            return message
        assert not isinstance(message, str | bytes | None)
        self._part = message
        return self._complete(message)

    def _complete(self, part: PartFrame) -> str | bytes | None:
        pending, start = self._pending, self._at
        end = min(len(pending), start + part.missing_bytes)
        self._go_on(end - start)
        message = part.add(pending, start, end)
        if message is None and part.plain:
            return None
        self._part = None
        if message is None:
            self._strict = True
            self._returned = part.give_back()
        return message

    def _next_frame(self) -> Frame | None:
        """The one place where wsproto is called for reading, and its errors become ours."""
        if self._ended:
            return None
        try:
            return next(self._frames.received_frames(), None)
        except ParseFailed as error:
            self._stop()
            reason = "message too big" if error.code == CloseReason.MESSAGE_TOO_BIG else str(error)
            raise RemoteProtocolError(reason, close_code=int(error.code)) from error

    def _stop(self) -> None:
        # RFC 6455 sections 7.1.7 and 5.5.1: nothing behind a failure or behind a Close is processed.
        self._ended = True
        self._pending, self._at = b"", 0
        self._partial = self._returned = None

    def _to_event(self, frame: Frame) -> WebSocketEvent:
        opcode, payload = frame.opcode, frame.payload
        if self._recogniser is not None:
            self._strict = not self._bounds.between_messages
        if opcode is Opcode.TEXT:
            assert isinstance(payload, str)
            if frame.message_finished and self._partial is None:
                return payload
            whole = self._add(payload.encode(), frame.message_finished)
            return _PARTIAL if whole is None else whole.decode()
        if opcode is Opcode.BINARY:
            assert isinstance(payload, bytes)
            if frame.message_finished and self._partial is None:
                return payload
            whole = self._add(payload, frame.message_finished)
            return _PARTIAL if whole is None else bytes(whole)
        if opcode is Opcode.CLOSE:
            assert isinstance(payload, tuple)
            self._stop()
            return Close(int(payload[0]), payload[1])
        assert isinstance(payload, bytes)
        return Ping(payload) if opcode is Opcode.PING else Pong(payload)

    def _add(self, piece: bytes, finished: bool) -> bytearray | None:
        """Keep a piece; the whole message once it is finished."""
        whole = self._partial if self._partial is not None else bytearray()
        whole += piece
        self._partial = None if finished else whole
        return whole if finished else None

    # Sending

    def send_text(self, text: str) -> tuple[bytes, ...]:
        """A whole text message, in pieces: copying a large payload behind its header costs more than a write.

        Raises:
            AppProtocolError: what UTF-8 cannot say (lone surrogates).
        """
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            # RFC 6455 section 5.6: "The "Payload data" is text data encoded as UTF-8."
            raise AppProtocolError(f"text message is not valid Unicode: {error}") from error
        if self._compressed:
            return (bytes(self._frames.send_data(text)),)
        return _build_frame(_TEXT_HEADS, data)

    def send_bytes(self, data: bytes) -> tuple[bytes, ...]:
        """A whole binary message, in pieces as above."""
        if self._compressed:
            return (bytes(self._frames.send_data(data)),)
        return _build_frame(_BINARY_HEADS, data)

    def ping(self, payload: bytes = b"") -> bytes:
        """A ping; the payload has at most 125 bytes. Nothing once a Close has been sent."""
        return b"" if self._close_sent else bytes(self._frames.ping(payload))

    def pong(self, payload: bytes = b"") -> bytes:
        """A pong; the payload is that of the ping. Nothing once a Close has been sent."""
        return b"" if self._close_sent else bytes(self._frames.pong(payload))

    def close(self, code: int = CloseCode.NORMAL, reason: str = "") -> bytes:
        """A Close; 1005 makes one without a code. A long reason is cut to 123 bytes, between two characters.

        Raises:
            AppProtocolError: a code that must not be sent, or a reason that is not valid Unicode.
        """
        if code != CloseCode.NO_CODE and not _may_be_sent(code):
            raise AppProtocolError(f"{code!r} is not a close code that may be sent")
        try:
            data = self._frames.close() if code == CloseCode.NO_CODE else self._frames.close(code, reason)
        except UnicodeEncodeError as error:
            raise AppProtocolError(f"close reason is not valid Unicode: {error}") from error
        self._close_sent = True
        return bytes(data)


def _build_frame(heads: list[bytes], data: bytes) -> tuple[bytes, ...]:
    """An unmasked, unfragmented frame (RFC 6455 section 5.2). `heads` are the headers of short ones."""
    size = len(data)
    if size < 126:
        return (heads[size] + data,)
    if size < 65536:
        return (_HEAD_16.pack(heads[0][0], 126, size) + data,)
    head = _HEAD_64.pack(heads[0][0], 127, size)
    return (head + data,) if size < JOINED_BYTES else (head, data)


def _may_be_sent(code: int) -> bool:
    """RFC 6455 section 7.4: 1004, 1005, 1006 and 1015 never; the rest of 1000-2999 when it is registered."""
    return 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999
