"""What an application may say while it starts."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

__all__ = ["extend_start", "tell_with"]

_tell: Callable[[float], object] | None = None


def tell_with(tell: Callable[[float], object] | None) -> None:
    """Have `tell` called with the seconds; the worker process does that before it imports the application."""
    global _tell
    _tell = tell


def extend_start(seconds: float) -> None:
    """Ask for more time to start: `start_timeout` ends this worker in `seconds` from now at the earliest.

    To be called while the application is imported or starts up, from any thread, as often as there is
    progress. Without a supervisor, without `start_timeout` and in a worker that is ready it does nothing.

    Raises:
        ValueError: not a positive, finite number.
    """
    if not (isfinite(seconds) and seconds > 0):
        raise ValueError(f"extend_start takes seconds above 0, not {seconds!r}")
    if _tell is not None:
        _tell(float(seconds))
