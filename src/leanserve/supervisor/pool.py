"""How many workers, and when a dead one may be replaced."""

from __future__ import annotations

from collections import deque

from leanserve.errors import SettingsError
from leanserve.scoreboard import MAX_SLOTS
from leanserve.settings import PoolSettings
from leanserve.supervisor.cgroup import available_cpus

__all__ = ["Restarts", "count_workers"]

_FIRST_WAIT_S = 0.1


def count_workers(workers: int | str) -> int:
    """The number meant by the setting; "auto" is the CPUs that this process may use.

    Raises:
        SettingsError: more than the scoreboard has room for.
    """
    number = workers if isinstance(workers, int) else available_cpus()
    if number > MAX_SLOTS:
        raise SettingsError(f"workers: {number} is more than the {MAX_SLOTS} that one server can have")
    return number


class Restarts:
    """The crashes of the recent past: how long to wait before the next start, and when to give up.

    A crash of a worker that lived is answered at once; one after the other, with twice the wait each time.

    Attributes:
        total: all crashes, however long ago.
    """

    __slots__ = ("_crashes", "_in_a_row", "_settings", "total")

    def __init__(self, settings: PoolSettings) -> None:
        self._settings = settings
        self._crashes: deque[float] = deque()
        self._in_a_row: dict[int, int] = {}
        self.total = 0

    def note_crash(self, slot: int, now_s: float, lived_s: float) -> float | None:
        """Note a crash; seconds until the replacement may start, or None when it is time to give up."""
        self.total += 1
        window = self._settings.restart_window
        while self._crashes and self._crashes[0] <= now_s - window:
            self._crashes.popleft()
        self._crashes.append(now_s)
        row = 0 if lived_s >= window else self._in_a_row.get(slot, 0)
        self._in_a_row[slot] = row + 1
        # The second count is for a slot whose waits and boots are so long that the window never fills.
        if max(len(self._crashes), row + 1) > self._settings.restart_limit:
            return None
        if row == 0:
            return 0.0
        wait = min(_FIRST_WAIT_S * 2.0 ** min(row - 1, 30), self._settings.restart_backoff_max)
        import random  # with its hashes; few supervisors ever come here

        return wait * random.uniform(0.8, 1.2)
