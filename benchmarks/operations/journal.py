"""Which requests the application has begun, and where: a file that all workers write into as memory.

What a process has written into a shared mapping stands, whatever kills it: a request that is lost can be
told from one that nobody ever began.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

JOURNAL_VARIABLE = "BENCHMARK_JOURNAL"
ENTRY = "<II"  # the process that began it last, how often it was begun
MOST_REQUESTS = 1 << 20


class Journal:
    """The reader's side. `path` is made, empty, with room for MOST_REQUESTS."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("w+b") as file:
            file.truncate(MOST_REQUESTS * struct.calcsize(ENTRY))
            self._entries = mmap.mmap(file.fileno(), 0)

    def begun(self, number: int) -> tuple[int, int]:
        """(pid or 0, how often) of request `number`."""
        pid, times = struct.unpack_from(ENTRY, self._entries, number * struct.calcsize(ENTRY))
        return pid, times

    def close(self) -> None:
        """Forget it; the file goes with its folder."""
        self._entries.close()
