"""How long a worker lives before it asks for a successor: by requests, age and memory."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from math import inf

from leanserve.settings import RecycleSettings

__all__ = ["Lifetime", "has_end", "resident_bytes"]

logger = logging.getLogger("leanserve")

# Whose successor has failed asks again; in between nobody shall boot one after the other in vain.
_ASK_AGAIN_S = 60.0
_STATM = "/proc/self/statm"


def has_end(settings: RecycleSettings) -> bool:
    """Whether there is any limit; jitter alone is none."""
    return any(
        limit is not None
        for limit in (
            settings.limit_max_requests, settings.limit_max_age, settings.limit_max_rss,
            settings.limit_max_gpu_memory,
        )
    )  # fmt: skip


class Lifetime:
    """Counts requests, refused ones too, and looks at age and memory.

    Beyond a limit all is served as before: the successor may not be ready.

    Args:
        settings: the limits and their jitter.
        on_full: called when one of them is reached, and once a minute from then on.
        now_s: of the clock that :meth:`look` is given; the age counts from here.

    Raises:
        SettingsError: the GPU memory cannot be asked for.
    """

    def __init__(
        self, settings: RecycleSettings, on_full: Callable[[], None] | None, now_s: float | None = None
    ) -> None:
        import random  # with its hashes; few workers ever come here

        def forgo(limit: float | None) -> float:
            return inf if limit is None else limit * (1 - random.uniform(0, settings.limit_jitter))

        self._on_full = on_full
        self._begun = 0
        self._most_requests = inf
        if settings.limit_max_requests is not None:
            self._most_requests = settings.limit_max_requests
            self._most_requests += random.randint(0, settings.limit_max_requests_jitter)
        born_s = time.monotonic() if now_s is None else now_s
        self._dies_s = born_s + forgo(settings.limit_max_age)
        self._most_rss = forgo(settings.limit_max_rss)
        self._most_gpu = forgo(settings.limit_max_gpu_memory)
        self._gpu = None
        if self._most_gpu < inf:
            from leanserve.worker.gpu import GpuMemory

            self._gpu = GpuMemory()
        self._ask_s = inf  # when to ask again; inf before the first time

    def __repr__(self) -> str:
        return f"<Lifetime {self._begun} requests{'' if self._ask_s == inf else ', full'}>"

    def count(self) -> None:
        """Another request has begun."""
        self._begun += 1
        if self._begun == self._most_requests:
            self._ask(f"{self._begun} requests", time.monotonic())

    def look(self, now_s: float) -> None:
        """Once a second; `now_s` is monotonic."""
        if self._ask_s < inf:
            if now_s >= self._ask_s:
                self._ask("it goes on beyond its limit", now_s)
            return
        why = self._find_end(now_s)
        if why:
            self._ask(why, now_s)

    def _find_end(self, now_s: float) -> str:
        if now_s >= self._dies_s:
            return "its age"
        if self._most_rss < inf and (rss := resident_bytes()) > self._most_rss:
            return f"{rss >> 20} MiB of resident memory"
        if self._gpu is not None and (used := self._gpu.look(now_s)) > self._most_gpu:
            return f"{used >> 20} MiB of GPU memory"
        return ""

    def _ask(self, why: str, now_s: float) -> None:
        self._ask_s = now_s + _ASK_AGAIN_S
        if self._on_full is not None:
            logger.info("pid %d asks for a successor: %s", os.getpid(), why)
            self._on_full()


def resident_bytes() -> int:
    """Resident memory of this process; where there is no /proc, the most that it ever had."""
    try:
        with open(_STATM, "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
