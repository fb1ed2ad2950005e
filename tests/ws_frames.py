"""What a WebSocket client puts on the wire, made by hand: also what no client library would send."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


def header(
    opcode: int, size: int, *, fin: bool = True, rsv: int = 0, mask: bytes | None = b"\x12\x34\x56\x78"
) -> bytes:
    """A frame header that declares `size` bytes."""
    first = fin << 7 | rsv << 4 | opcode
    masked = 0x80 if mask is not None else 0
    if size < 126:
        head = struct.pack("!BB", first, masked | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", first, masked | 126, size)
    else:
        head = struct.pack("!BBQ", first, masked | 127, size)
    return head + (mask or b"")


def frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0,
    mask: bytes | None = b"\x12\x34\x56\x78",
) -> bytes:
    """A whole frame, masked unless `mask` is None."""
    head = header(opcode, len(payload), fin=fin, rsv=rsv, mask=mask)
    if mask is None:
        return head + payload
    keys = (mask * (len(payload) // 4 + 1))[: len(payload)]
    size = len(payload)
    return head + (int.from_bytes(payload, "big") ^ int.from_bytes(keys, "big")).to_bytes(size, "big")


def long_form(opcode: int, size: int, *, bytes_: int) -> bytes:
    """A header that says its length in two or eight bytes, whether it needs them or not."""
    first = bytes((0x80 | opcode, 0x80 | (126 if bytes_ == 2 else 127)))
    return first + size.to_bytes(bytes_, "big") + bytes(4)


def close(code: int | None = None, reason: bytes = b"") -> bytes:
    """A Close frame."""
    return frame(CLOSE, b"" if code is None else struct.pack("!H", code) + reason)


def deflated(data: bytes, *, bits: int = 15) -> bytes:
    """One message, compressed as RFC 7692 section 7.2.1 says."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -bits)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


def parse(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(opcode, rsv, payload) of each frame that a server sent: whole, unmasked, unfragmented."""
    while data:
        assert data[0] & 0x80, "fragment"
        assert not data[1] & 0x80, "a server must not mask (RFC 6455 section 5.1)"
        size, start = data[1], 2
        if size == 126:
            size, start = struct.unpack_from("!H", data, 2)[0], 4
        elif size == 127:
            size, start = struct.unpack_from("!Q", data, 2)[0], 10
        assert len(data) >= start + size, "cut frame"
        yield data[0] & 0x0F, data[0] >> 4 & 7, data[start : start + size]
        data = data[start + size :]
