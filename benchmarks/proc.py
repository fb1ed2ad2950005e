"""CPU time and memory of a process and all below it, from the Linux kernel."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_CPUCLOCK_SCHED = 2  # linux/posix-timers.h: the clock of a whole process, in ns, exited threads included


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from `state` on; the name before it may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def tree(root: int) -> set[int]:
    """`root` and all its descendants that live now."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended between the two looks
                parents[int(entry.name)] = int(_stat(int(entry.name))[1])
    found, level = {root}, {root}
    while level:
        level = {pid for pid, parent in parents.items() if parent in level} - found
        found |= level
    return found


def _process_clock_s(pid: int) -> float:
    """User and system time of one process, in ns resolution where the kernel tells it, else in ticks."""
    try:
        return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
    except OSError:
        return sum(map(int, _stat(pid)[11:13])) / _TICKS_PER_S


def cpu_seconds(root: int) -> float:
    """User and system time of `root` and all below it; of dead children too, once they are waited for."""
    used = 0.0
    for pid in tree(root):
        with contextlib.suppress(OSError):  # it has just ended
            used += _process_clock_s(pid) + sum(map(int, _stat(pid)[13:15])) / _TICKS_PER_S
    return used


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one process, or of several together, in bytes.

    Attributes:
        rss: resident pages, shared ones counted in every process.
        pss: resident pages, shared ones divided by the number of their users.
        uss: resident pages that nobody shares.
    """

    rss: int
    pss: int
    uss: int


def memory(pids: set[int]) -> Memory:
    """The sum over these processes."""
    totals = {"Rss": 0, "Pss": 0, "Private_Clean": 0, "Private_Dirty": 0}
    for pid in pids:
        with contextlib.suppress(OSError):  # it has just ended
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
                name, _, value = line.partition(":")
                if name in totals:
                    totals[name] += int(value.split()[0]) * 1024
    return Memory(totals["Rss"], totals["Pss"], totals["Private_Clean"] + totals["Private_Dirty"])
