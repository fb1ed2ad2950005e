"""What the control group of this process allows and has suffered (Linux; nothing elsewhere)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_cpus", "cpu_quota", "oom_kills"]

_PROC = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


def available_cpus(proc: Path = _PROC, root: Path = _ROOT) -> int:
    """CPUs that are worth a worker each: the affinity, and no more than the quota rounded up."""
    if hasattr(os, "sched_getaffinity"):
        affinity = len(os.sched_getaffinity(0))
    else:
        affinity = os.cpu_count() or 1
    quota = cpu_quota(proc, root)
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def cpu_quota(proc: Path = _PROC, root: Path = _ROOT) -> float | None:
    """CPUs by quota: the tightest on the way from our group to the root, or None without one."""
    found = [quota for folder in _folders("cpu", proc, root) if (quota := _quota(folder)) is not None]
    return min(found, default=None)


def oom_kills(proc: Path = _PROC, root: Path = _ROOT) -> int:
    """How many processes of our group the kernel has killed for want of memory."""
    for folder in _folders("memory", proc, root):
        for name in ("memory.events", "memory.oom_control"):
            for line in _read(folder / name).splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill" and value.isdigit():
                    return int(value)
    return 0


def _folders(controller: str, proc: Path, root: Path) -> Iterator[Path]:
    """Our group's folders from the inside out, version 2 and version 1.

    In a container the path of /proc may not exist under the mounted root, which then is the group itself.
    """
    for line in _read(proc).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            base = root
        elif controller in controllers.split(","):
            base = next((b for b in (root / controllers, root / controller) if b.is_dir()), root)
        else:
            continue
        group = base / path.strip("/")
        while group != base and base in group.parents:
            yield group
            group = group.parent
        yield base


def _quota(folder: Path) -> float | None:
    """cpu.max is "QUOTA PERIOD" or "max PERIOD"; version 1 has two files, and -1 for none."""
    words = _read(folder / "cpu.max").split()
    if not words:
        words = [_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()]
    try:
        quota, period = int(words[0]), int(words[1])
    except (ValueError, IndexError):
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
