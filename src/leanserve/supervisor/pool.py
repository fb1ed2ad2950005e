"""How many workers, and when a dead one may be replaced."""

from __future__ import annotations

from collections import deque
from math import ceil

from leanserve.errors import SettingsError
from leanserve.scoreboard import MAX_SLOTS
from leanserve.settings import CrashSettings, PoolSettings
from leanserve.supervisor.cgroup import cpu_limits, memory_limit

__all__ = ["Restarts", "count_auto", "count_workers"]

_FIRST_WAIT_S = 0.1


def count_workers(settings: PoolSettings) -> tuple[int, str]:
    """The number meant by ``workers``, and where "auto" has it from ("" for a plain number).

    "auto" is a worker for each CPU that this process may use, and no more than its memory has room for.

    Raises:
        SettingsError: more than the scoreboard has room for.
    """
    if not isinstance(settings.workers, int):
        memory = None if settings.worker_memory is None else memory_limit()
        return count_auto(*cpu_limits(), memory, settings.worker_memory)
    if settings.workers > MAX_SLOTS:
        raise SettingsError(
            f"workers: {settings.workers} is more than the {MAX_SLOTS} that one server can have"
        )
    return settings.workers, ""


def count_auto(
    affinity: int, quota: float | None, limit_bytes: int | None, worker_bytes: int | None
) -> tuple[int, str]:
    """What "auto" is, and why; CPUs, and bytes of the whole and of one worker (None: not known)."""
    bounds, why = [affinity, MAX_SLOTS], [f"{affinity} CPU{'' if affinity == 1 else 's'} by affinity"]
    if quota is not None:
        bounds.append(ceil(quota))
        why.append(f"a quota of {quota:g}")
    if worker_bytes is not None and limit_bytes is not None:
        bounds.append(limit_bytes // worker_bytes)
        why.append(f"{limit_bytes >> 20} MiB of memory for workers of {worker_bytes >> 20} MiB")
    number = max(min(bounds), 1)
    return number, f"workers=auto is {number}: {', '.join(why)}"


class Restarts:
    """The crashes of the recent past: how long to wait before the next start, and when to give up.

    A crash of a worker that lived is answered at once; one after the other, with twice the wait each time.

    Attributes:
        total: all crashes, however long ago.
    """

    __slots__ = ("_crashes", "_in_a_row", "_settings", "total")

    def __init__(self, settings: CrashSettings) -> None:
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
