"""Memory back to the kernel when a crowd has left.

The C library keeps what a thousand connections and their TLS handshakes have used, in case they come again.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, Final

__all__ = ["Trimmer", "trim"]

# A crowd: as many connections as this have gone, and they were most of those that there were.
_CROWD: Final = 100
# The C library goes through all that is free, and nobody in this process gets memory meanwhile.
_REST_S: Final = 2.0


class Trimmer:
    """Looks once a second how many connections there are.

    Args:
        trim: gives free memory back; called in a thread.
    """

    __slots__ = ("_most", "_rest_until", "_trim")

    def __init__(self, trim: Callable[[], Any]) -> None:
        self._trim = trim
        self._most = 0
        self._rest_until = 0.0

    def look(self, connections: int, now: float) -> None:
        """Give memory back when most of `connections` have left since the last time; `now` in seconds."""
        self._most = max(self._most, connections)
        if self._most - connections >= max(_CROWD, self._most // 2) and now >= self._rest_until:
            self._most = connections
            self._rest_until = now + _REST_S
            threading.Thread(target=self._trim, name="leanserve-trim", daemon=True).start()


def trim() -> None:
    """glibc's ``malloc_trim(0)``; nothing with another C library."""
    if sys.platform != "linux":
        return
    import ctypes  # most workers never come here

    found = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if found is not None:
        found(ctypes.c_size_t(0))
