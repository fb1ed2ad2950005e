"""The hang limit: a worker whose loop stands still for longer than the operator allows is ended.

Nothing looks unless a limit is set, and no worker is looked at before it was ready: one that imports or loads
a model is healthy. Only time in which this process ran counts: whatever stops a whole container or machine
for a while is no hang of the workers in it.
"""

from __future__ import annotations

import logging
from math import inf

from leanserve.settings import Settings
from leanserve.supervisor.child import ChildState
from leanserve.supervisor.crew import Crew

__all__ = ["Hangs"]

logger = logging.getLogger("leanserve")

_PER_LIMIT = 4
_LONGEST_PERIOD_S = 1.0


class Hangs:
    """Looks at the heartbeats of all workers, now and then.

    Args:
        crew: the workers.

    Attributes:
        look_at_s: when to look again, in monotonic seconds; inf while there is no limit.
    """

    def __init__(self, crew: Crew) -> None:
        self.look_at_s = inf
        self._crew = crew
        #: By pid: the last heartbeat, and since when no other was seen.
        self._beats: dict[int, tuple[int, float]] = {}

    def keep_time(self, now_s: float, settings: Settings) -> None:
        """Look, when it is time to, and end those that are late."""
        limit_s = settings.crash.hang_limit
        if limit_s is None:
            self.look_at_s = inf
            self._beats.clear()
        elif now_s >= self.look_at_s or self.look_at_s == inf:
            overslept_s = 0.0 if self.look_at_s == inf else now_s - self.look_at_s
            self.look_at_s = now_s + min(limit_s / _PER_LIMIT, _LONGEST_PERIOD_S)
            self._look(now_s, limit_s, overslept_s, settings.drain.kill_grace)

    def _look(self, now_s: float, limit_s: float, overslept_s: float, grace_s: float) -> None:
        seen, self._beats = self._beats, {}
        for child in self._crew.children.values():
            records = self._crew.records(child) if child.state is ChildState.READY else []
            if not records:
                continue
            # Of several loops in threads, the one that has been silent for longest.
            last_ns = min(record.heartbeat_ns for record in records)
            beat, since_s = seen.get(child.pid, (0, now_s))
            since_s = since_s + overslept_s if beat == last_ns else now_s
            self._beats[child.pid] = last_ns, since_s
            if now_s - since_s > limit_s:
                logger.error(
                    "worker %s: its loop has stood still for %.1f s (hang_limit): stacks, then SIGTERM",
                    child, now_s - since_s,
                )  # fmt: skip
                child.end_late(limit_s, now_s + grace_s)
