"""What the codecs say: typed values between bytes and the connection.

*Event* is the word of this layer; *message* is ASGI's.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

__all__ = ["FORWARDED", "TIMED", "BodyKind", "Data", "EndOfBody", "Headers", "Request", "Upgrade"]

#: Header lines in the order received, names in lower case.
Headers = list[tuple[bytes, bytes]]


#: The fields in which a proxy says whom it speaks for.
FORWARDED = frozenset({b"x-forwarded-for", b"x-forwarded-proto"})

#: The field in which a client says how long it will wait, by its usual name.
TIMED = frozenset({b"request-timeout"})


class BodyKind(IntEnum):
    """How the body of a request is framed (RFC 9112 section 6.3)."""

    NONE = 0
    LENGTH = 1
    CHUNKED = 2


class Upgrade(IntEnum):
    """What an Upgrade header asks for; anything that we do not speak is NONE and changes nothing."""

    NONE = 0
    WEBSOCKET = 1


@dataclass(slots=True)
class Request:
    """A complete request head that passed all checks. Nobody changes it: one may stand for many equal heads.

    Attributes:
        method: as sent (methods are case-sensitive, RFC 9110 section 9.1).
        raw_path: path as sent, still percent-encoded, without the query; b"*" for ``OPTIONS *``.
        query: what stands behind the first "?", without it.
        version: "1.0" or "1.1".
        headers: names in lower case; the host line is the authority when the target was absolute-form.
        keep_alive: whether the client lets the connection live after this exchange.
        body: how the body is framed.
        content_length: number of body bytes announced, or None when chunked.
        expects_continue: the client waits for 100 before it sends the body.
        upgrade: the protocol asked for, if we speak it.
        accepts_trailers: the client sent ``TE: trailers``.
        forwarded: a proxy's ``x-forwarded-for`` or ``x-forwarded-proto`` is among the headers.
        timed: ``request-timeout`` is.
    """

    method: bytes
    raw_path: bytes
    query: bytes
    version: str
    headers: Headers
    keep_alive: bool = True
    body: BodyKind = BodyKind.NONE
    content_length: int | None = 0
    expects_continue: bool = False
    upgrade: Upgrade = Upgrade.NONE
    accepts_trailers: bool = False
    forwarded: bool = False
    timed: bool = False


@dataclass(slots=True)
class Data:
    """A piece of a request body, framing removed."""

    data: bytes


@dataclass(slots=True)
class EndOfBody:
    """The request is complete; said only behind a head that announced a body."""
