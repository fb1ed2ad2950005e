"""Compression of WebSocket messages (RFC 7692), with an end to what a small message may swell to.

wsproto compresses and calls; inflating is done here, because it has to stop at the size limit *while* it
inflates, and because a control frame between two fragments must not end the message. The negotiation is here
because the operator limits what a connection may cost in memory.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Final

from wsproto.extensions import PerMessageDeflate
from wsproto.frame_protocol import CloseReason, FrameDecoder, FrameProtocol, Opcode, RsvBits

__all__ = ["BoundedDeflate", "negotiate_deflate"]

# RFC 7692 section 7.2.2: "Append 4 octets of 0x00 0x00 0xff 0xff to the tail end of the payload".
_TAIL: Final = b"\x00\x00\xff\xff"
_RSV1: Final = RsvBits(True, False, False)

# RFC 7692 section 7.1: what each parameter may say. zlib cannot make the window of 8 bits that section 7.1.2
# allows, so an offer that insists on it is declined.
_BITS = re.compile(r"9|1[0-5]")
_FLAGS: Final = ("client_no_context_takeover", "server_no_context_takeover")
_MOST_BITS: Final = 15


class BoundedDeflate(PerMessageDeflate):
    """permessage-deflate for one connection.

    Args:
        max_size_bytes: most bytes that a message may have once it is inflated.
        mem_level: zlib's memLevel of the compressor, 1 to 9: it takes 2**(mem_level + 9) bytes for it, and
            2**(window bits + 2) for its window.
    """

    def __init__(self, max_size_bytes: int, mem_level: int = zlib.DEF_MEM_LEVEL) -> None:
        super().__init__()
        self._max_size_bytes = max_size_bytes
        self._mem_level = mem_level
        self._left_bytes = 0
        self._message_compressed = False
        self._inflating = False

    def agree(self, offered: Mapping[str, str | None], window_bits: int, *, context_takeover: bool) -> str:
        """Settle on what is both offered and allowed here; the parameters of the answer."""
        self._enabled = True
        # RFC 7692 sections 7.1.1 and 7.1.2.1: all but client_max_window_bits may be said though nobody asked.
        self.client_no_context_takeover = not context_takeover or "client_no_context_takeover" in offered
        self.server_no_context_takeover = not context_takeover or "server_no_context_takeover" in offered
        answer = [name for name in _FLAGS if getattr(self, name)]
        # Section 7.1.2.2: without it in the offer it "MUST NOT" be in the answer.
        for name, may_be_said in (
            ("client_max_window_bits", "client_max_window_bits" in offered),
            ("server_max_window_bits", window_bits < _MOST_BITS or "server_max_window_bits" in offered),
        ):
            if may_be_said:
                bits = min(window_bits, int(offered.get(name) or _MOST_BITS))
                setattr(self, name, bits)
                answer.append(f"{name}={bits}")
        return "; ".join([self.name, *answer])

    def frame_outbound(
        self, proto: FrameDecoder | FrameProtocol, opcode: Opcode, rsv: RsvBits, data: bytes, fin: bool
    ) -> tuple[RsvBits, bytes]:
        """Compress a frame."""
        if self._compressor is None and not opcode.iscontrol():
            self._compressor = zlib.compressobj(
                wbits=-self.server_max_window_bits, memLevel=self._mem_level
            )
        return super().frame_outbound(proto, opcode, rsv, data, fin)

    def frame_inbound_header(
        self, proto: FrameDecoder | FrameProtocol, opcode: Opcode, rsv: RsvBits, payload_length: int
    ) -> CloseReason | RsvBits:
        """Note whether the message is compressed. wsproto may call this several times for one header."""
        if rsv.rsv1 and (opcode.iscontrol() or opcode is Opcode.CONTINUATION):
            # RFC 7692 section 6.1: the bit stands on the first frame of a message only.
            return CloseReason.PROTOCOL_ERROR
        if opcode is Opcode.TEXT or opcode is Opcode.BINARY:
            self._message_compressed = rsv.rsv1
            self._left_bytes = self._max_size_bytes
        self._inflating = self._message_compressed and not opcode.iscontrol()
        return _RSV1

    def frame_inbound_payload_data(
        self, proto: FrameDecoder | FrameProtocol, data: bytes
    ) -> bytes | CloseReason:
        """Inflate a piece of the payload."""
        return self._inflate(data) if self._inflating else data

    def frame_inbound_complete(
        self, proto: FrameDecoder | FrameProtocol, fin: bool
    ) -> bytes | CloseReason | None:
        """Inflate what the end of the message sets free."""
        if not fin or not self._inflating:
            return None
        last = self._inflate(_TAIL)
        if self.client_no_context_takeover:
            self._decompressor = None
        return last

    def _inflate(self, data: bytes) -> bytes | CloseReason:
        pieces: list[bytes] = []
        try:
            while data:
                if self._decompressor is None:
                    self._decompressor = zlib.decompressobj(-self.client_max_window_bits)
                # One byte more than allowed is enough to know; fewer than asked for: nothing is held back.
                piece = self._decompressor.decompress(data, self._left_bytes + 1)
                if len(piece) > self._left_bytes:
                    return CloseReason.MESSAGE_TOO_BIG
                self._left_bytes -= len(piece)
                pieces.append(piece)
                if not self._decompressor.eof:
                    break
                # RFC 7692 section 7.2.3.4: a block with BFINAL set ends the stream, and a new one may follow.
                data = self._decompressor.unused_data
                self._decompressor = None
        except zlib.error:
            return CloseReason.INVALID_FRAME_PAYLOAD_DATA
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def negotiate_deflate(
    offers: Iterable[str],
    max_size_bytes: int,
    window_bits: int = _MOST_BITS,
    mem_level: int = zlib.DEF_MEM_LEVEL,
    *,
    context_takeover: bool = True,
) -> tuple[BoundedDeflate, str] | None:
    """Take the first offer that can be met (RFC 7692 section 5).

    Args:
        offers: the elements of Sec-WebSocket-Extensions, in the client's order of preference.
        max_size_bytes: see BoundedDeflate.
        window_bits: largest window of either side, 9 to 15; a client that does not offer to limit its own
            keeps 15.
        mem_level: see BoundedDeflate.
        context_takeover: whether either side may keep its window from one message to the next.

    Returns:
        The extension and the value to answer with, or None: the connection goes uncompressed.
    """
    for offer in offers:
        if (offered := _parse_offer(offer)) is not None:
            extension = BoundedDeflate(max_size_bytes, mem_level)
            return extension, extension.agree(offered, window_bits, context_takeover=context_takeover)
    return None


def _parse_offer(offer: str) -> dict[str, str | None] | None:
    """The parameters. RFC 7692 section 7.1: decline an offer with an unknown, invalid or repeated one."""
    name, *parameters = (part.strip(" \t") for part in offer.split(";"))
    if name != PerMessageDeflate.name:
        return None
    seen: dict[str, str | None] = {}
    for parameter in parameters:
        key, equals, value = parameter.partition("=")
        if key in seen or not _is_parameter(key, value if equals else None):
            return None
        seen[key] = value if equals else None
    return seen


def _is_parameter(key: str, value: str | None) -> bool:
    if key in _FLAGS:
        return value is None
    if key == "client_max_window_bits" and value is None:
        return True  # section 7.1.2.2: without a value it says only that the client can limit its window
    if key in ("client_max_window_bits", "server_max_window_bits"):
        return value is not None and _BITS.fullmatch(value) is not None
    return False
