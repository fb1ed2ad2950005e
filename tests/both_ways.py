"""The strict ways by themselves, and what a codec makes of pieces: what recognisers are compared with."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from leanserve.errors import AppProtocolError, RemoteProtocolError
from leanserve.protocol.deflate import negotiate_deflate
from leanserve.protocol.events import Request, Upgrade
from leanserve.protocol.fastframes import FrameRecogniser
from leanserve.protocol.fastpath import PlainHead, ResponseEncoder
from leanserve.protocol.http1 import Http1Codec
from leanserve.protocol.responses import DefaultHeaders, Framing, check_headers
from leanserve.protocol.websocket import Partial, WebSocketCodec, WebSocketEvent
from leanserve.settings import HttpSettings

SETTINGS = HttpSettings()
SMALL = HttpSettings(request_line_bytes=64, header_bytes=256, header_count=4)
OURS = DefaultHeaders([(b"date", b"Sat, 21 Nov 2026 10:00:00 GMT"), (b"server", b"x"), (b"x-own", b"1")])


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """The data in pieces, cut at these places."""
    ends = [0, *sorted({place for place in places if 0 < place < len(data)}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def strict_request(head: bytes, limits: HttpSettings = SETTINGS) -> Request | None:
    """What the codec makes of a head without the recogniser; None when it is refused."""
    codec = Http1Codec(limits)
    codec.receive(head + b"\r\n\r\n")
    try:
        event = codec.next_event()
    except RemoteProtocolError:
        return None
    assert event is None or isinstance(event, Request)
    return event


def read_requests(pieces: Iterable[bytes], codec: Http1Codec) -> list[list[Any]]:
    """For each piece the events that it completes, each request answered at its end.

    A refusal is its status and text, and ends the list; so does the last request of a connection, or an
    upgrade, with the bytes behind it.
    """
    seen: list[list[Any]] = []
    for piece in pieces:
        now: list[Any] = []
        seen.append(now)
        codec.receive(piece)
        try:
            while (event := codec.next_event()) is not None:
                now.append(event)
                if codec.request_ended:
                    request = codec.request
                    assert request is not None
                    if not request.keep_alive or request.upgrade is not Upgrade.NONE:
                        now.append(codec.take_rest())
                        return seen
                    codec.next_exchange()
        except RemoteProtocolError as error:
            now.append((error.status, str(error)))
            return seen
    return seen


def planned_response(
    request: Request, status: int, headers: Any, body: bytes, *, close: bool
) -> bytes | None:
    """The response as planned and encoded without the fast path; None when it is refused."""
    codec = Http1Codec(SETTINGS)
    codec.request = request
    try:
        data = codec.encode_response(status, check_headers(headers), OURS, body, more=False, close=close)
    except AppProtocolError:
        return None
    assert codec.response is not None
    return None if codec.response.fault else data


#: Bytes of a head; framing, bytes still to come and close as it says them.
Start = tuple[bytes, Framing, int, bool]


def planned_start(request: Request, status: int, headers: Any, *, close: bool) -> Start | None:
    """The same for a response whose body comes in pieces: its head."""
    codec = Http1Codec(SETTINGS)
    codec.request = request
    try:
        data = codec.encode_response(status, check_headers(headers), OURS, b"", more=True, close=close)
    except AppProtocolError:
        return None
    head = codec.response
    assert head is not None
    return data, head.framing, head.left, head.close


def plain_start(
    encoder: ResponseEncoder, request: Request, status: int, plain: PlainHead, *, close: bool
) -> Start | None:
    """What the encoder makes of it."""
    found = encoder.encode_start(request, status, plain, OURS, close)
    if found is None:
        return None
    data, head = found
    assert (head.status, head.fault) == (status, None)
    return data, head.framing, head.left, head.close


def new_websocket(
    recogniser: FrameRecogniser | None, *, limit: int, compressed: bool = False
) -> WebSocketCodec:
    """A codec that takes messages of at most `limit` bytes in at most 20 fragments."""
    offers = ["permessage-deflate; client_no_context_takeover"] if compressed else []
    agreed = negotiate_deflate(offers, limit)
    return WebSocketCodec(
        max_size_bytes=limit, max_fragments=20, deflate=agreed and agreed[0], recogniser=recogniser
    )


def read_frames(
    pieces: Iterable[bytes], codec: WebSocketCodec, *, in_one_step: bool = False
) -> list[list[WebSocketEvent | int]]:
    """For each piece the events that it completes; a violation is its close code.

    With `in_one_step`, each piece goes through ``receive_message`` instead of ``receive``.
    """
    seen: list[list[WebSocketEvent | int]] = []
    for piece in pieces:
        now: list[WebSocketEvent | int] = []
        if not in_one_step:
            codec.receive(piece)
        elif (message := codec.receive_message(piece)) is not None:
            now.append(message)
        try:
            while (event := codec.next_event()) is not None:
                if not isinstance(event, Partial):
                    now.append(event)
        except RemoteProtocolError as error:
            now.append(error.close_code)
        seen.append(now)
    return seen
