"""How many workers, and when a dead one may be replaced."""

from __future__ import annotations

import math
import os
import random
from collections import deque
from pathlib import Path

from leanserve.settings import PoolSettings

__all__ = ["Restarts", "count_workers"]

_CGROUP = Path("/sys/fs/cgroup")
_FIRST_WAIT_S = 0.1


def count_workers(workers: int | str, cgroup: Path = _CGROUP) -> int:
    """The number meant by the setting; "auto" is the CPUs that this process may use.

    The smaller of the CPU affinity and the cgroup's quota, at least 1.
    """
    if isinstance(workers, int):
        return workers
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read_quota(cgroup)
    return max(1, usable if quota is None else min(usable, math.ceil(quota)))


def _read_quota(cgroup: Path) -> float | None:
    """CPUs allowed by cgroup v2 (``cpu.max``) or v1 (``cpu.cfs_quota_us``); None without a quota."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not quota.isdigit() or not period.isdigit() or not int(period):
        return None  # "max", or -1
    return int(quota) / int(period)


class Restarts:
    """The crashes of the recent past: how long to wait before the next start, and when to give up.

    A crash of a worker that lived is answered at once; one after the other, with twice the wait each time.
    """

    __slots__ = ("_crashes", "_in_a_row", "_settings")

    def __init__(self, settings: PoolSettings) -> None:
        self._settings = settings
        self._crashes: deque[float] = deque()
        self._in_a_row: dict[int, int] = {}

    def note_crash(self, slot: int, now_s: float, lived_s: float) -> float | None:
        """Note a crash; seconds until the replacement may start, or None when it is time to give up."""
        window = self._settings.restart_window
        while self._crashes and self._crashes[0] <= now_s - window:
            self._crashes.popleft()
        self._crashes.append(now_s)
        if len(self._crashes) > self._settings.restart_limit:
            return None
        row = self._in_a_row.get(slot, 0)
        self._in_a_row[slot] = 1 if lived_s >= window else row + 1
        if row == 0 or lived_s >= window:
            return 0.0
        wait = min(_FIRST_WAIT_S * 2.0 ** (row - 1), self._settings.restart_backoff_max)
        return wait * random.uniform(0.8, 1.2)
