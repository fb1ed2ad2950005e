"""A log line per bad peer, but not one per bad packet: whoever floods us must not flood the log."""

from __future__ import annotations

import logging
import time
from typing import Any

__all__ = ["Complaints"]


class Complaints:
    """At most `per_second` lines a second; then one line that says how many were left out.

    Args:
        logger: where the lines go, at level INFO.
        per_second: the limit.
    """

    __slots__ = ("_count", "_logger", "_per_second", "_second", "_suppressed")

    def __init__(self, logger: logging.Logger, per_second: int = 10) -> None:
        self._logger = logger
        self._per_second = per_second
        self._second = 0
        self._count = 0
        self._suppressed = 0

    def add(self, message: str, *args: Any) -> None:
        """Log a complaint, or count it. Arguments are escaped: they hold what a peer has sent."""
        second = int(time.monotonic())
        if second != self._second:
            if self._suppressed:
                self._logger.info("%d more refusals not logged", self._suppressed)
            self._second, self._count, self._suppressed = second, 0, 0
        self._count += 1
        if self._count > self._per_second:
            self._suppressed += 1
        else:
            self._logger.info(message, *(ascii(arg)[1:-1] if isinstance(arg, str) else arg for arg in args))
