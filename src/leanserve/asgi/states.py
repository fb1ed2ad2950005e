"""The two machines of an HTTP exchange: its response, and the body of its request."""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar

from leanserve.machine import Machine

__all__ = ["BodyMachine", "BodyMove", "BodyState", "ResponseMachine", "ResponseMove", "ResponseState"]


class ResponseState(IntEnum):
    """The response side of an exchange."""

    WAITING = 0  # nothing said yet
    HELD = 1  # the head is said, and held back until the first body message: a failure is still a clean 500
    STREAMING = 2
    TRAILING = 3  # the body has ended, trailers are to come
    UNHEARD = 4  # the client has gone, and the application is to finish as if it were there
    DONE = 5
    GONE = 6  # there is nobody to answer any more


class ResponseMove(IntEnum):
    """What the application or the connection can do to the response."""

    START = 0
    BODY = 1
    LAST_BODY = 2
    BODY_BEFORE_TRAILERS = 3
    TRAILERS = 4
    FAIL = 5
    IGNORE = 6
    LOSE = 7


class ResponseMachine(Machine[ResponseState, ResponseMove]):
    """ASGI: "The protocol server must not start sending the response ... until it has received at least one
    Response Body event"; FAIL is our own answer (500, 503, 504) in the place of one that was not given."""

    __slots__ = ()
    START: ClassVar[IntEnum] = ResponseState.WAITING
    TABLE: ClassVar = {
        (ResponseState.WAITING, ResponseMove.START): ResponseState.HELD,
        (ResponseState.WAITING, ResponseMove.FAIL): ResponseState.DONE,
        (ResponseState.WAITING, ResponseMove.IGNORE): ResponseState.UNHEARD,
        (ResponseState.WAITING, ResponseMove.LOSE): ResponseState.GONE,
        (ResponseState.HELD, ResponseMove.BODY): ResponseState.STREAMING,
        (ResponseState.HELD, ResponseMove.LAST_BODY): ResponseState.DONE,
        (ResponseState.HELD, ResponseMove.BODY_BEFORE_TRAILERS): ResponseState.TRAILING,
        (ResponseState.HELD, ResponseMove.FAIL): ResponseState.DONE,
        (ResponseState.HELD, ResponseMove.IGNORE): ResponseState.UNHEARD,
        (ResponseState.HELD, ResponseMove.LOSE): ResponseState.GONE,
        (ResponseState.STREAMING, ResponseMove.BODY): ResponseState.STREAMING,
        (ResponseState.STREAMING, ResponseMove.LAST_BODY): ResponseState.DONE,
        (ResponseState.STREAMING, ResponseMove.BODY_BEFORE_TRAILERS): ResponseState.TRAILING,
        (ResponseState.STREAMING, ResponseMove.IGNORE): ResponseState.UNHEARD,
        (ResponseState.STREAMING, ResponseMove.LOSE): ResponseState.GONE,
        (ResponseState.TRAILING, ResponseMove.TRAILERS): ResponseState.DONE,
        (ResponseState.TRAILING, ResponseMove.IGNORE): ResponseState.UNHEARD,
        (ResponseState.TRAILING, ResponseMove.LOSE): ResponseState.GONE,
        (ResponseState.UNHEARD, ResponseMove.LAST_BODY): ResponseState.DONE,
        (ResponseState.UNHEARD, ResponseMove.LOSE): ResponseState.GONE,
        (ResponseState.DONE, ResponseMove.LOSE): ResponseState.DONE,
        (ResponseState.GONE, ResponseMove.LOSE): ResponseState.GONE,
    }


class BodyState(IntEnum):
    """The request body of an exchange."""

    UNREAD = 0  # the application has not asked for it
    READING = 1
    ENDED = 2  # all of it is here
    DELIVERED = 3  # all of it is with the application
    CUT = 4  # the rest will not come


class BodyMove(IntEnum):
    """What can happen to the request body."""

    ASK = 0
    END = 1
    DELIVER = 2
    CUT = 3


class BodyMachine(Machine[BodyState, BodyMove]):
    """UNREAD and READING differ in one thing: 100 (Continue) is sent on the way from one to the other."""

    __slots__ = ()
    START: ClassVar[IntEnum] = BodyState.UNREAD
    TABLE: ClassVar = {
        (BodyState.UNREAD, BodyMove.ASK): BodyState.READING,
        (BodyState.UNREAD, BodyMove.END): BodyState.ENDED,
        (BodyState.UNREAD, BodyMove.CUT): BodyState.CUT,
        (BodyState.READING, BodyMove.ASK): BodyState.READING,
        (BodyState.READING, BodyMove.END): BodyState.ENDED,
        (BodyState.READING, BodyMove.CUT): BodyState.CUT,
        (BodyState.ENDED, BodyMove.ASK): BodyState.ENDED,
        (BodyState.ENDED, BodyMove.DELIVER): BodyState.DELIVERED,
        (BodyState.ENDED, BodyMove.CUT): BodyState.CUT,
        (BodyState.DELIVERED, BodyMove.ASK): BodyState.DELIVERED,
        (BodyState.DELIVERED, BodyMove.CUT): BodyState.CUT,
        (BodyState.CUT, BodyMove.ASK): BodyState.CUT,
        (BodyState.CUT, BodyMove.END): BodyState.CUT,
        (BodyState.CUT, BodyMove.CUT): BodyState.CUT,
    }
