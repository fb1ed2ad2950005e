"""CPU time of a process and all below it, from /proc."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_seconds(root: int) -> float:
    """utime + stime of `root` and all its descendants; of dead children too, once they are waited for."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended between the two looks
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
                ticks[int(entry.name)] = sum(map(int, fields[11:15]))
    tree, level = {root}, {root}
    while level:
        level = {pid for pid, parent in parents.items() if parent in level} - tree
        tree |= level
    return sum(ticks.get(pid, 0) for pid in tree) / _TICKS_PER_S
