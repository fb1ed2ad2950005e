"""What the control group of this process allows and has suffered (Linux; elsewhere the machine's limits)."""

from __future__ import annotations

import os
from collections.abc import Iterator

__all__ = ["cpu_limits", "cpu_quota", "memory_limit", "oom_kills"]

# Texts and no pathlib, which would be a tenth of what the supervisor imports.
_Path = str | os.PathLike[str]
_PROC = "/proc/self/cgroup"
_ROOT = "/sys/fs/cgroup"


def cpu_limits(proc: _Path = _PROC, root: _Path = _ROOT) -> tuple[int, float | None]:
    """CPUs that this process may run on, and :func:`cpu_quota`."""
    if hasattr(os, "sched_getaffinity"):
        affinity = len(os.sched_getaffinity(0))
    else:
        affinity = os.cpu_count() or 1
    return affinity, cpu_quota(proc, root)


def cpu_quota(proc: _Path = _PROC, root: _Path = _ROOT) -> float | None:
    """CPUs by quota: the tightest on the way from our group to the root, or None without one."""
    found = [quota for folder in _folders("cpu", proc, root) if (quota := _quota(folder)) is not None]
    return min(found, default=None)


def memory_limit(proc: _Path = _PROC, root: _Path = _ROOT) -> int | None:
    """Bytes: the tightest limit on the way from our group to the root, and no more than the machine has.

    None where nobody can say.
    """
    found = []
    for folder in _folders("memory", proc, root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(os.path.join(folder, name)).strip()
            if text.isdigit():  # "max" is none; that of version 1 is larger than any machine
                found.append(int(text))
    try:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        pass  # not on every platform
    return min(found, default=None)


def oom_kills(proc: _Path = _PROC, root: _Path = _ROOT) -> int:
    """How many processes of our group the kernel has killed for want of memory."""
    for folder in _folders("memory", proc, root):
        for name in ("memory.events", "memory.oom_control"):
            for line in _read(os.path.join(folder, name)).splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill" and value.isdigit():
                    return int(value)
    return 0


def _folders(controller: str, proc: _Path, root: _Path) -> Iterator[str]:
    """Our group's folders from the inside out, version 2 and version 1.

    In a container the path of /proc may not exist under the mounted root, which then is the group itself.
    """
    for line in _read(proc).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            base = os.fspath(root)
        elif controller in controllers.split(","):
            mounts = (os.path.join(root, name) for name in (controllers, controller))
            base = next((mount for mount in mounts if os.path.isdir(mount)), os.fspath(root))
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            yield os.path.join(base, *parts[:depth])


def _quota(folder: str) -> float | None:
    """cpu.max is "QUOTA PERIOD" or "max PERIOD"; version 1 has two files, and -1 for none."""
    words = _read(os.path.join(folder, "cpu.max")).split()
    if not words:
        words = [_read(os.path.join(folder, f"cpu.cfs_{name}_us")).strip() for name in ("quota", "period")]
    try:
        quota, period = int(words[0]), int(words[1])
    except (ValueError, IndexError):
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(path: _Path) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
