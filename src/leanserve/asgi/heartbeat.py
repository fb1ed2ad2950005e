"""When to send a WebSocket ping, and when silence behind it means a dead peer. Time is an argument."""

from __future__ import annotations

from enum import IntEnum
from math import inf
from typing import Final

__all__ = ["Beat", "Heartbeat"]

# A loop that stood still has not read what arrived meanwhile, and some loops run timers before they read. So
# nobody is declared dead before a last look this long after the timeout, and a last look that comes this late
# itself proves that the loop stood still again.
_LAST_LOOK_S: Final = 1.0


class Beat(IntEnum):
    """What a look at the heartbeat asks for."""

    NOTHING = 0
    PING = 1
    DEAD = 2


class Heartbeat:
    """One per WebSocket. Whatever the peer sends is life; it need not be the pong.

    Args:
        interval_s: between two pings; None or 0 sends none.
        timeout_s: silence allowed behind a ping; None or 0 allows any.
    """

    __slots__ = ("_interval_s", "_last_look", "_ping_at", "_pong_by", "_timeout_s", "silent")

    def __init__(self, interval_s: float | None, timeout_s: float | None) -> None:
        self._interval_s = interval_s or inf
        self._timeout_s = timeout_s or inf
        self._ping_at = inf
        self._pong_by = inf
        #: Whether nothing has come since the last ping. Whoever reads bytes of the peer sets it to False.
        self.silent = False
        self._last_look = False

    def start(self, now: float) -> None:
        """The WebSocket opened at loop time `now`."""
        self._ping_at = now + self._interval_s

    @property
    def next_look(self) -> float:
        """Loop time at which to call :meth:`look`, inf for never."""
        return min(self._ping_at, self._pong_by)

    def look(self, now: float, *, reading: bool) -> Beat:
        """What is due.

        Args:
            now: loop time in seconds.
            reading: whether bytes of the peer would have been seen; while the application is too slow to
                receive, its peer's silence says nothing.
        """
        if now >= self._pong_by:
            if not self.silent or not reading:
                self._pong_by = inf
            elif self._last_look and now - self._pong_by < _LAST_LOOK_S:
                return Beat.DEAD
            else:
                self._last_look = True
                self._pong_by = now + min(_LAST_LOOK_S, self._timeout_s)
        if now < self._ping_at:
            return Beat.NOTHING
        self._ping_at = now + self._interval_s
        if not self.silent or self._pong_by == inf:
            self.silent = True
            self._last_look = False
            self._pong_by = now + self._timeout_s
        return Beat.PING
