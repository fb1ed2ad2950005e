"""The value of a ``date`` header. email.utils has it too, and brings a tenth of all that a worker imports."""

from __future__ import annotations

import time

__all__ = ["format_date"]

# English whatever the locale, so not strftime's.
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def format_date(seconds: int) -> bytes:
    """Seconds since 1970 as IMF-fixdate (RFC 9110 section 5.6.7): ``Sun, 06 Nov 1994 08:49:37 GMT``."""
    year, month, day, hour, minute, second, weekday, *_ = time.gmtime(seconds)
    text = f"{_DAYS[weekday]}, {day:02} {_MONTHS[month - 1]} {year:04} {hour:02}:{minute:02}:{second:02} GMT"
    return text.encode("ascii")
