"""How long one request may take: its limits, and the comments that keep a silent stream alive.

Most requests have no limit, and no timer. A timer has one place in the worker's deadlines, at the limit that
comes first; a limit that a piece of the response has moved on is found to be later when its time comes.
"""

from __future__ import annotations

from collections.abc import Awaitable
from enum import IntEnum
from math import isfinite
from typing import TYPE_CHECKING, Any, Final

from leanserve.asgi.states import ResponseState
from leanserve.protocol.events import TIMED, Headers, Request
from leanserve.protocol.responses import REASONS, Framing
from leanserve.settings import RequestSettings
from leanserve.transport.deadlines import NEVER

if TYPE_CHECKING:
    from leanserve.asgi.http import HttpExchange

__all__ = ["ExchangeTimer", "find_timeout", "times_all", "too_late"]

_COMMENT: Final = b":\n"


class _Limit(IntEnum):
    WHOLE = 0  # from the complete request to the end of the response
    START = 1  # from the complete request to the first byte of the response
    GAP = 2  # between two pieces of the response
    COMMENT = 3  # between two pieces of an event stream; then a comment goes out


def times_all(settings: RequestSettings) -> bool:
    """Whether every request has a timer."""
    limits = (
        settings.request_timeout, settings.response_start_timeout, settings.response_gap_timeout,
        settings.sse_comment_interval,
    )  # fmt: skip
    # Only the usual name is known to those who read heads; another one has to be looked for here.
    name = _field_name(settings)
    return any(limit is not None for limit in limits) or (name != b"" and name not in TIMED)


def find_timeout(request: Request, settings: RequestSettings) -> float | None:
    """Seconds that the request may take: what its client asks for, at most what the settings allow.

    What is no number of seconds is not an error: others use fields of this name, too.
    """
    allowed = settings.request_timeout
    name = _field_name(settings)
    for found, value in request.headers if name else ():
        if found == name:
            try:
                asked = float(value)
            except ValueError:
                continue
            if isfinite(asked):
                allowed = asked if allowed is None else min(asked, allowed)
    return allowed


def _field_name(settings: RequestSettings) -> bytes:
    return (settings.request_timeout_header or "").lower().encode("latin-1")


async def too_late(scope: Any, receive: Any, send: Any) -> None:
    """What answers a request that has no time left before it has begun."""
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": 504, "headers": headers})
    await send({"type": "http.response.body", "body": REASONS[504]})


class ExchangeTimer:
    """The limits of one exchange.

    Args:
        exchange: told ``time_is_up()``.
        timeout_s: for the whole, None without.
    """

    __slots__ = ("_ends", "_exchange", "_line_ended", "_sending", "_timeout_s", "deadline", "queue_item")

    def __init__(self, exchange: HttpExchange, timeout_s: float | None) -> None:
        self._exchange = exchange
        self._timeout_s = timeout_s
        self._ends: dict[_Limit, float] = {}
        self._line_ended = True
        self._sending = 0
        self.deadline = NEVER
        self.queue_item: list[Any] | None = None

    # What the exchange tells

    def begin(self) -> None:
        """The request is complete, or the application does not take what is here of it."""
        self._set(_Limit.WHOLE, self._timeout_s)
        if self._exchange.response <= ResponseState.HELD:  # else it has begun ahead of the request's end
            self._set(_Limit.START, self._exchange.service.settings.request.response_start_timeout)
        self._arm()

    def rewind(self) -> None:
        """The application wants more of the request: its time begins when it is complete."""
        self._ends.pop(_Limit.WHOLE, None)
        self._ends.pop(_Limit.START, None)

    def head_sent(self, headers: Headers) -> None:
        """The response has begun."""
        settings = self._exchange.service.settings.request
        self.said_to_nobody()
        if settings.sse_comment_interval is not None and _takes_comments(headers):
            head = self._exchange.connection.codec.response
            if head is not None and head.framing in (Framing.CHUNKED, Framing.CLOSE):
                self._set(_Limit.COMMENT, settings.sse_comment_interval)
        self._arm()

    def piece_sent(self, data: bytes) -> None:
        """The application has said something."""
        settings = self._exchange.service.settings.request
        if _Limit.GAP in self._ends:
            self._set(_Limit.GAP, settings.response_gap_timeout)
        if _Limit.COMMENT in self._ends:
            self._set(_Limit.COMMENT, settings.sse_comment_interval)
        if data:
            self._line_ended = data.endswith(b"\n")

    def said_to_nobody(self) -> None:
        """The application has said something, which moves the limits even where its client has gone."""
        self._ends.pop(_Limit.START, None)
        self._set(_Limit.GAP, self._exchange.service.settings.request.response_gap_timeout)
        self._arm()

    async def leave_out(self, waiting: Awaitable[None]) -> None:
        """Await what the client keeps waiting: that is no gap of the application's."""
        self._sending += 1
        try:
            await waiting
        finally:
            self._sending -= 1
            if _Limit.GAP in self._ends:
                self._set(_Limit.GAP, self._exchange.service.settings.request.response_gap_timeout)

    def end(self) -> None:
        """The application has ended."""
        self._ends.clear()
        self._exchange.service.deadlines.forget(self)

    # Time

    def deadline_reached(self) -> None:
        """Called by Deadlines, at the earliest end that there was when it was last armed."""
        exchange, settings = self._exchange, self._exchange.service.settings.request
        now = exchange.service.deadlines.now()
        if self._ends.get(_Limit.GAP, NEVER) <= now and self._sending:
            self._set(_Limit.GAP, settings.response_gap_timeout)
        if self._ends.get(_Limit.COMMENT, NEVER) <= now:
            self._set(_Limit.COMMENT, settings.sse_comment_interval)
            # Behind half a line, a comment would become part of it.
            if self._line_ended and exchange.connection.gate.open:
                exchange.send_comment(_COMMENT)
        if any(end <= now for end in self._ends.values()):
            self._ends.clear()
            exchange.time_is_up()
        else:
            self._arm()

    def _set(self, limit: _Limit, seconds: float | None) -> None:
        if seconds is not None:
            self._ends[limit] = self._exchange.service.deadlines.now() + seconds

    def _arm(self) -> None:
        if self._ends:
            deadlines = self._exchange.service.deadlines
            deadlines.set(self, max(min(self._ends.values()) - deadlines.now(), 0.0))


def _takes_comments(headers: Headers) -> bool:
    """An event stream as it is: within an encoded one a comment would be damage."""
    fields = dict(headers)
    media_type = fields.get(b"content-type", b"").partition(b";")[0].strip().lower()
    return media_type == b"text/event-stream" and b"content-encoding" not in fields
