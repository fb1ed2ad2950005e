"""Plain WebSocket data frames, recognised in front of wsproto (docs/explain/fastpath.md).

A recogniser returns exactly what the strict way would return, or None. It never raises, never answers and
has no options; None costs nothing but the time of the strict way. Deleting this module leaves every other
test green.
"""

from __future__ import annotations

import sys
import threading
from codecs import getincrementaldecoder
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

__all__ = ["FrameRecogniser", "PartFrame", "unmask"]

# The first byte of a plain frame (RFC 6455 section 5.2): FIN, no reserved bit, the opcode of text or binary.
_TEXT: Final = 0x81
_BINARY: Final = 0x82
# The second is this and the length.
_MASKED: Final = 0x80

_NOTHING_YET: Final = (None, 0)

# From these lengths on, this way of unmasking is faster than the one before it.
_TABLES_FROM: Final = 384
_NUMPY_FROM: Final = 768

# Pieces of a long frame below this size are put together.
_SMALL_PIECE: Final = 4096
# What is given back at a time; a multiple of the key's length.
_PIECE_BYTES: Final = 65536

_from_bytes = int.from_bytes  # looked up once: the rest of unmasking a short message costs little more
_Utf8Decoder = getincrementaldecoder("utf-8")


class FrameRecogniser:
    """Recognises plain frames: one unfragmented, uncompressed, masked message each. One per worker.

    Attributes:
        recognised, declined: how many messages it took, and how many frames it left to wsproto.
        why: what was not plain in the last one declined.
    """

    __slots__ = ("declined", "recognised", "why")

    def __init__(self) -> None:
        self.recognised = 0
        self.declined = 0
        self.why = ""

    def decline(self, why: str) -> None:
        """Count one and keep the reason."""
        self.declined += 1
        self.why = why

    def recognise_frame(
        self, data: bytes | bytearray, at: int, max_size_bytes: int
    ) -> tuple[str | bytes | PartFrame | None, int] | None:
        """The message in the frame that begins at ``data[at]``.

        Args:
            data: bytes of the peer, at least one of them behind `at`.
            at: where a frame begins, and no message is under way.
            max_size_bytes: a longer message is not plain.

        Returns:
            The message and the length of its frame; or a PartFrame and the length of its header, when the end
            of the frame has not arrived; or (None, 0), when the end of its header has not; or None.
        """
        have = len(data) - at
        kind = data[at]
        if kind != _BINARY and kind != _TEXT:
            self.decline(f"the first byte, {kind:#04x}")
            return None
        if have < 2:
            return _NOTHING_YET
        size, head_bytes = data[at + 1] - _MASKED, 6
        if size > 125:
            head_bytes = 8 if size == 126 else 14
            if have < head_bytes - 4:
                return _NOTHING_YET
            size = _read_length(data[at + 2 : at + head_bytes - 4])
        if not 0 <= size <= max_size_bytes:
            self.decline("the length or a missing mask")
            return None
        start = at + head_bytes
        end = start + size
        if end > len(data):
            if have < head_bytes:
                return _NOTHING_YET
            return PartFrame(self, bytes(data[at:start]), size), head_bytes
        payload = unmask(data, start, end, data[start - 4 : start])
        if kind == _BINARY:
            self.recognised += 1
            return payload, end - at
        try:
            text = payload.decode()
        except UnicodeDecodeError:
            self.decline("text that is no UTF-8")
            return None
        self.recognised += 1
        return text, end - at


class PartFrame:
    """A plain frame whose end has not arrived. Each byte is unmasked once, when it comes.

    Args:
        recogniser: which counts the outcome.
        head: the whole header.
        size_bytes: of the payload.
    """

    __slots__ = (
        "_decoder", "_head", "_pieces", "_recogniser", "_size_bytes", "_text", "missing_bytes", "plain",
    )  # fmt: skip

    def __init__(self, recogniser: FrameRecogniser, head: bytes, size_bytes: int) -> None:
        self._recogniser = recogniser
        self._head = head
        self._decoder = _Utf8Decoder() if head[0] == _TEXT else None
        self._size_bytes = size_bytes
        # Bytes are joined at the end: one copy. Text grows in one buffer: it is decoded from there, or given
        # back when it is no UTF-8.
        self._pieces: list[bytes] = []
        self._text = bytearray()
        #: How much of the payload is still to come.
        self.missing_bytes = size_bytes
        #: Whether it still may be plain. If not, the strict way has to be given what came: :meth:`give_back`.
        self.plain = True

    def add(self, data: bytes | bytearray, start: int, end: int) -> str | bytes | None:
        """Take in more of the payload, at most `missing_bytes`: ``data[start:end]``. The message, if that was
        the rest of it and it is plain."""
        turned = (self._size_bytes - self.missing_bytes) & 3
        key = self._head[-4:]
        piece = unmask(data, start, end, key[turned:] + key[:turned])
        self.missing_bytes -= end - start
        if self._decoder is None:
            if self._pieces and len(self._pieces[-1]) < _SMALL_PIECE:
                self._pieces[-1] += piece  # byte by byte, a message must not cost fifty times its size
            else:
                self._pieces.append(piece)
            if self.missing_bytes:
                return None
            self._recogniser.recognised += 1
            return b"".join(self._pieces)
        self._text += piece
        try:
            if self.missing_bytes:
                # What is wrong is told before the end, as the strict way does. The text itself is made at the
                # end, from all bytes at once: in pieces it could take four times the memory.
                self._decoder.decode(piece)
                return None
            message = self._text.decode()
        except UnicodeDecodeError:
            self.plain = False
            self._recogniser.decline("text that is no UTF-8")
            return None
        self._recogniser.recognised += 1
        return message

    def give_back(self) -> Iterator[bytes]:
        """The text frame as it came, so far, in pieces: all at once would hold the event loop. Masking is its
        own inverse (RFC 6455 section 5.3)."""
        yield self._head
        text, key = self._text, self._head[-4:]
        for start in range(0, len(text), _PIECE_BYTES):
            yield unmask(text, start, min(start + _PIECE_BYTES, len(text)), key)


def _read_length(data: bytes | bytearray) -> int:
    """The number in two or eight bytes; below 0 when it must not be written so."""
    size = int.from_bytes(data, "big")
    # RFC 6455 section 5.2: "the minimal number of bytes MUST be used to encode the length", and of eight
    # bytes "the most significant bit MUST be 0".
    least, most = (126, 1 << 16) if len(data) == 2 else (1 << 16, 1 << 63)
    return size if least <= size < most else -1


def unmask(data: bytes | bytearray, start: int, end: int, key: bytes | bytearray) -> bytes:
    """``data[start:end]`` without its mask.

    RFC 6455 section 5.3: octet i is combined with octet i MOD 4 of the key.
    """
    size = end - start
    if size < _TABLES_FROM:
        keys = (key * (size // 4 + 1))[:size]
        mixed = _from_bytes(data[start:end], "little") ^ _from_bytes(keys, "little")
        return mixed.to_bytes(size, "little")
    numpy = (_numpy or _load_numpy()) if size >= _NUMPY_FROM else None
    if numpy is not None:
        return _unmask_words(numpy, data, start, end, key)
    result = bytearray(data[start:end])
    for turn in range(4):
        result[turn::4] = result[turn::4].translate(_table(key[turn]))
    return bytes(result)


def _unmask_words(
    numpy: Any, data: bytes | bytearray, start: int, end: int, key: bytes | bytearray
) -> bytes:
    """unmask() eight bytes at a time, from a multiple of eight on, which may be a little before `start`."""
    before = start & 7
    first = start - before
    turned = -before & 3
    keys = (key[turned:] + key[:turned]) * 2
    count = (end - first) // 8
    word = numpy.uint64(_from_bytes(keys, sys.byteorder))
    mixed = numpy.frombuffer(data, numpy.uint64, count, first) ^ word
    rest = data[first + count * 8 : end]
    size = len(rest)
    last = (_from_bytes(rest, "little") ^ _from_bytes(keys[:size], "little")).to_bytes(size, "little")
    return b"".join((memoryview(mixed).cast("B")[before:], last))


@cache
def _table(key: int) -> bytes:
    """What each byte becomes under one octet of a key."""
    return bytes(byte ^ key for byte in range(256))


_numpy: Any = None


def _load_numpy() -> Any:
    """numpy once it is loaded. Few servers ever see a large frame, so the first one has it loaded, in a
    thread: that takes a tenth of a second, and no peer may hold the event loop for so long."""
    global _numpy
    numpy = sys.modules.get("numpy")
    if numpy is not None and not getattr(numpy.__spec__, "_initializing", False):
        _numpy = numpy
    else:
        _begin_import()
    return _numpy


@cache
def _begin_import() -> None:
    threading.Thread(target=_import_numpy, name="leanserve-numpy", daemon=True).start()


def _import_numpy() -> None:
    try:
        import numpy  # noqa: F401
    except ImportError:
        pass  # it is optional
