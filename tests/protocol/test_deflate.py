"""Negotiation of permessage-deflate, and its bound while it inflates."""

from __future__ import annotations

import os
import random
import zlib
from typing import Any

import pytest
from wsproto.frame_protocol import CloseReason, FrameDecoder, Opcode, RsvBits

from leanserve.protocol.deflate import BoundedDeflate, negotiate_deflate
from ws_frames import deflated

PLAIN, RSV1 = RsvBits(False, False, False), RsvBits(True, False, False)
DECODER = FrameDecoder(client=False)


def negotiated(*offers: str, size: int = 1000) -> tuple[BoundedDeflate, str]:
    found = negotiate_deflate(offers, size)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("offer", "answer"),
    [
        ("permessage-deflate", "permessage-deflate"),
        ("permessage-deflate; client_max_window_bits", "permessage-deflate; client_max_window_bits=15"),
        ("permessage-deflate; client_max_window_bits=9", "permessage-deflate; client_max_window_bits=9"),
        ("permessage-deflate;server_max_window_bits=10", "permessage-deflate; server_max_window_bits=10"),
        ("permessage-deflate; server_no_context_takeover", "permessage-deflate; server_no_context_takeover"),
        ("permessage-deflate; client_no_context_takeover", "permessage-deflate; client_no_context_takeover"),
    ],
)
def test_offers_that_are_met(offer: str, answer: str) -> None:
    assert negotiated(offer)[1] == answer


@pytest.mark.parametrize(
    "parameters",
    [
        "server_max_window_bits=abc", 'server_max_window_bits="15"', "server_max_window_bits=",
        "server_max_window_bits", "server_max_window_bits=7", "server_max_window_bits=8",
        "server_max_window_bits=16", "server_max_window_bits=015", "server_max_window_bits=+9",
        "server_max_window_bits=-9", "server_max_window_bits=1_5",
        "server_max_window_bits=99999999999999999999",
        "server_max_window_bits=\u0661\u0662", "client_max_window_bits=abc", "client_max_window_bits=",
        "client_max_window_bits=8", "client_max_window_bits=16", "server_no_context_takeover=1",
        "client_no_context_takeover=", "server_no_context_takeover; server_no_context_takeover",
        "server_max_window_bits=10; server_max_window_bits=11", "unknown", "unknown=1", "", ";", "=", "=9",
        "server_max_window_bits =10", "server_no_context_takeover_x", "client_max_window_bits_x=10",
    ],
)  # fmt: skip
def test_offers_that_are_ignored(parameters: str) -> None:
    assert negotiate_deflate([f"permessage-deflate; {parameters}"], 1000) is None
    # and the one behind them is still taken
    assert negotiated(f"permessage-deflate; {parameters}", "permessage-deflate")[1] == "permessage-deflate"


def test_a_declined_offer_leaves_nothing_behind() -> None:
    extension, answer = negotiated(
        "permessage-deflate; client_no_context_takeover; server_max_window_bits=8",
        "x-webkit-deflate-frame",
        "permessage-deflate; client_max_window_bits",
    )
    assert answer == "permessage-deflate; client_max_window_bits=15"
    assert not extension.client_no_context_takeover


def test_nothing_offered() -> None:
    assert negotiate_deflate([], 1000) is None
    assert negotiate_deflate(["x", "permessage-deflate2", "Permessage-deflate"], 1000) is None


def receive(extension: BoundedDeflate, *fragments: bytes, rsv: RsvBits = RSV1) -> bytes | CloseReason:
    """One message through the hooks, as wsproto calls them."""
    message = b""
    for number, fragment in enumerate(fragments):
        opcode = Opcode.CONTINUATION if number else Opcode.BINARY
        used = extension.frame_inbound_header(DECODER, opcode, PLAIN if number else rsv, len(fragment))
        assert not isinstance(used, CloseReason)
        data = extension.frame_inbound_payload_data(DECODER, fragment)
        if isinstance(data, CloseReason):
            return data
        last = extension.frame_inbound_complete(DECODER, number == len(fragments) - 1)
        if isinstance(last, CloseReason):
            return last
        message += data + (last or b"")
    return message


def test_messages() -> None:
    extension, _ = negotiated("permessage-deflate")
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    for text in (b"Hello", b"", b"Hello", b"x" * 1000, b"Hello"):
        data = (compressor.compress(text) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]
        assert receive(extension, data) == text
        assert receive(extension, b"plain", rsv=PLAIN) == b"plain"
    cut = deflated(b"Hello" * 100)
    assert receive(negotiated("permessage-deflate")[0], cut[:3], b"", cut[3:]) == b"Hello" * 100


def test_a_ping_between_fragments_changes_nothing() -> None:
    extension, _ = negotiated("permessage-deflate")
    data = deflated(b"Hello" * 20)
    extension.frame_inbound_header(DECODER, Opcode.BINARY, RSV1, 4)
    first = extension.frame_inbound_payload_data(DECODER, data[:4])
    extension.frame_inbound_complete(DECODER, False)
    extension.frame_inbound_header(DECODER, Opcode.PING, PLAIN, 4)
    assert extension.frame_inbound_payload_data(DECODER, b"ping") == b"ping"
    assert extension.frame_inbound_complete(DECODER, True) is None
    extension.frame_inbound_header(DECODER, Opcode.CONTINUATION, PLAIN, len(data) - 4)
    rest = extension.frame_inbound_payload_data(DECODER, data[4:])
    last = extension.frame_inbound_complete(DECODER, True)
    assert isinstance(first, bytes)
    assert isinstance(rest, bytes)
    assert isinstance(last, bytes)
    assert first + rest + last == b"Hello" * 20


@pytest.mark.parametrize("opcode", [Opcode.CONTINUATION, Opcode.PING, Opcode.PONG, Opcode.CLOSE])
def test_the_bit_where_it_must_not_stand(opcode: Opcode) -> None:
    extension, _ = negotiated("permessage-deflate")
    assert extension.frame_inbound_header(DECODER, opcode, RSV1, 0) is CloseReason.PROTOCOL_ERROR


def test_the_final_block_of_rfc_7692_7_2_3_4() -> None:
    extension, _ = negotiated("permessage-deflate")
    final = bytes.fromhex("f3 48 cd c9 c9 07 00 00")
    assert receive(extension, final) == b"Hello"
    assert receive(extension, final) == b"Hello"
    assert receive(extension, deflated(b"again")) == b"again"


def test_without_context_takeover_each_message_stands_alone() -> None:
    extension, _ = negotiated("permessage-deflate; client_no_context_takeover")
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    word = b"a long enough word to be referred to"
    first, second = (
        (compressor.compress(word) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4] for _ in range(2)
    )
    assert receive(extension, first) == word
    assert receive(extension, second) is CloseReason.INVALID_FRAME_PAYLOAD_DATA


@pytest.mark.parametrize("size", [0, 1, 999, 1000])
def test_up_to_the_limit(size: int) -> None:
    assert receive(negotiated("permessage-deflate")[0], deflated(bytes(size))) == bytes(size)


@pytest.mark.parametrize("size", [1001, 1002, 10_000, 1 << 20])
def test_beyond_the_limit(size: int) -> None:
    data = deflated(bytes(size))
    assert receive(negotiated("permessage-deflate")[0], data) is CloseReason.MESSAGE_TOO_BIG
    single = (data[i : i + 1] for i in range(len(data)))
    assert receive(negotiated("permessage-deflate")[0], *single) is CloseReason.MESSAGE_TOO_BIG


def test_the_limit_holds_while_inflating() -> None:
    """64 KiB that would be 64 MiB: no more of it is made than is needed to know."""
    import tracemalloc

    bomb = deflated(b"\0" * (1 << 26))
    extension, _ = negotiated("permessage-deflate")
    extension.frame_inbound_header(DECODER, Opcode.BINARY, RSV1, len(bomb))
    tracemalloc.start()
    try:
        assert extension.frame_inbound_payload_data(DECODER, bomb) is CloseReason.MESSAGE_TOO_BIG
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_many_final_blocks_do_not_get_round_the_limit() -> None:
    block = zlib.compressobj(9, zlib.DEFLATED, -15)
    final = block.compress(bytes(600)) + block.flush(zlib.Z_FINISH)
    assert receive(negotiated("permessage-deflate")[0], final * 2) is CloseReason.MESSAGE_TOO_BIG


def test_rubbish() -> None:
    assert receive(negotiated("permessage-deflate")[0], b"\xff" * 9) is CloseReason.INVALID_FRAME_PAYLOAD_DATA


@pytest.mark.parametrize(
    ("offer", "allowed", "answer"),
    [
        # RFC 7692 section 7.1.2.2: not said to a client that did not say that it can.
        ("", {"window_bits": 11}, "server_max_window_bits=11"),
        (
            "client_max_window_bits", {"window_bits": 11},
            "client_max_window_bits=11; server_max_window_bits=11",
        ),
        (
            "client_max_window_bits=9", {"window_bits": 11},
            "client_max_window_bits=9; server_max_window_bits=11",
        ),
        ("server_max_window_bits=9", {"window_bits": 11}, "server_max_window_bits=9"),
        ("server_max_window_bits=14", {"window_bits": 11}, "server_max_window_bits=11"),
        ("", {"context_takeover": False}, "client_no_context_takeover; server_no_context_takeover"),
        ("", {"mem_level": 1}, ""),
    ],
)  # fmt: skip
def test_what_the_operator_allows(offer: str, allowed: dict[str, Any], answer: str) -> None:
    """Row 24 of docs/reference/demands.md."""
    offers = [f"permessage-deflate; {offer}" if offer else "permessage-deflate"]
    found = negotiate_deflate(offers, 1000, **allowed)
    assert found is not None
    assert found[1] == "; ".join(filter(None, ["permessage-deflate", answer]))


def _send(extension: BoundedDeflate, data: bytes) -> bytes:
    rsv, sent = extension.frame_outbound(DECODER, Opcode.BINARY, PLAIN, data, True)
    assert rsv == RSV1
    return sent


def test_the_window_out_is_what_was_agreed() -> None:
    """Row 24. A repetition a kilobyte back is out of sight of a window of 512 bytes."""
    noise = random.Random(24).randbytes(1024)
    sizes = []
    for bits in (9, 15):
        found = negotiate_deflate(["permessage-deflate"], 1 << 20, bits)
        assert found is not None
        sent = _send(found[0], noise * 8)
        sizes.append(len(sent))
        assert zlib.decompressobj(-bits).decompress(sent + b"\0\0\xff\xff") == noise * 8
    assert sizes[0] > 8000 > 2000 > sizes[1]


def test_without_context_takeover_nothing_is_kept() -> None:
    """Row 24. Each message out can be read by itself, and no window is left between two."""
    found = negotiate_deflate(["permessage-deflate"], 1 << 20, context_takeover=False)
    assert found is not None
    extension, _ = found
    word = b"a long enough word to be referred to" * 3
    for _ in range(3):
        assert zlib.decompressobj(-15).decompress(_send(extension, word) + b"\0\0\xff\xff") == word
        assert receive(extension, deflated(word)) == word
        assert (extension._compressor, extension._decompressor) == (None, None)


def test_memory_of_a_compressor() -> None:
    """Row 24: what the settings are for, as zlib's own formula says: 2**(bits+2) + 2**(level+9) bytes."""
    def resident() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096

    grown = []
    kept: list[BoundedDeflate] = []
    for bits, level in ((9, 1), (15, 8)):
        before = resident()
        for _ in range(200):
            found = negotiate_deflate(["permessage-deflate"], 1000, bits, level)
            assert found is not None
            _send(found[0], os.urandom(100_000))  # touches all of it
            kept.append(found[0])
        grown.append((resident() - before) / 200)
    assert grown[0] < 50_000
    assert grown[1] > 3 * grown[0]
