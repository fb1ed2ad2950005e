"""How long a worker may take to be ready."""

from __future__ import annotations

import logging
import time
from math import inf

from leanserve.channel import DUMP_SIGNAL
from leanserve.settings import RollSettings
from leanserve.supervisor.child import Child, ChildState
from leanserve.supervisor.crew import Crew

__all__ = ["StartBudget"]

logger = logging.getLogger("leanserve")

# SIGTERM has its default effect in a worker that boots, and would end it before it has written its stacks.
_DUMP_S = 0.5
# From SIGTERM to SIGKILL.
_GRACE_S = 1.0


class StartBudget:
    """Ends workers that are not ready in time: their stacks, then SIGTERM, then SIGKILL.

    Args:
        settings: the limit, if there is one.
        crew: the workers.
    """

    def __init__(self, settings: RollSettings, crew: Crew) -> None:
        self._limit_s = settings.start_timeout
        self._crew = crew
        self._ends_s: dict[int, float] = {}
        self._dumped: set[int] = set()
        self._given_up: set[int] = set()

    @property
    def next_s(self) -> float:
        """When there is something to do; monotonic seconds."""
        return min(self._ends_s.values(), default=inf)

    def begin(self, child: Child) -> None:
        """It boots."""
        if self._limit_s is not None:
            self._ends_s[child.pid] = child.born_s + self._limit_s

    def extend(self, child: Child, seconds: float) -> None:
        """It asks for so many seconds from now. Never less than it has; too late is too late."""
        if child.pid in self._ends_s and child.pid not in self._dumped:
            self._ends_s[child.pid] = max(self._ends_s[child.pid], time.monotonic() + seconds)

    def forget(self, child: Child) -> bool:
        """It has ended; whether it was given up."""
        given_up = child.pid in self._given_up
        self._ends_s.pop(child.pid, None)
        self._dumped.discard(child.pid)
        self._given_up.discard(child.pid)
        return given_up

    def keep_time(self, now_s: float) -> None:
        """Do what is due."""
        for pid in [pid for pid, when in self._ends_s.items() if when <= now_s]:
            child = self._crew.children[pid]
            if child.state is not ChildState.STARTING:  # ready, or told to leave for another reason
                del self._ends_s[pid]
            elif pid in self._dumped:
                del self._ends_s[pid]
                self._given_up.add(pid)
                child.error = _describe(child, now_s)
                child.retire("retire", now_s + _GRACE_S)
            else:
                self._report(child, now_s)

    def _report(self, child: Child, now_s: float) -> None:
        logger.error("worker %s is %s; its stacks follow, then its end", child, _describe(child, now_s))
        if self._crew.record(child) is not None:  # else it could not yet say what it does
            child.signal(DUMP_SIGNAL)
        self._dumped.add(child.pid)
        self._ends_s[child.pid] = now_s + _DUMP_S


def _describe(child: Child, now_s: float) -> str:
    return f"not ready within {now_s - child.born_s:.1f} s (start_timeout)"
