"""What follows from the end of a worker."""

from __future__ import annotations

import logging
import signal
import time
from typing import TYPE_CHECKING

from leanserve.supervisor.cgroup import oom_kills
from leanserve.supervisor.child import Child, ChildState, describe_exit
from leanserve.supervisor.pool import Restarts
from leanserve.supervisor.states import SupervisorState

if TYPE_CHECKING:
    from leanserve.supervisor.supervisor import Supervisor

__all__ = ["Deaths"]

logger = logging.getLogger("leanserve")

_EXIT_SETTINGS, _EXIT_BOOT, _EXIT_GAVE_UP = 2, 3, 4


class Deaths:
    """Tells farewells from failed starts and from crashes, and what comes next.

    Attributes:
        exit_code: of the supervisor: 0, 2 or 3 when no worker could start, 4 when they crash too often.
        restarts: the crashes.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self.exit_code = 0
        self.restarts = Restarts(supervisor.settings.crash)
        self._supervisor = supervisor
        self._oom_kills = oom_kills()

    def note(self, child: Child, state: ChildState, code: int) -> None:
        """A worker has ended, in this state and with this exit code."""
        supervisor = self._supervisor
        if supervisor.machine.state is SupervisorState.STOPPING:
            logger.debug("worker %s has left (%s)", child, describe_exit(code))
            if child.booted:
                # It may have been killed, and then its own listeners still listen.
                supervisor.refuse_orphans(
                    slot for slot in child.slots if not supervisor.crew.in_slot(slot)
                )
        elif state >= ChildState.RETIRING:
            logger.info("worker %s has left", child)
            waits = child.slot in supervisor.start_at  # its successor has crashed
            if child.slot < supervisor.slots and not waits and not supervisor.crew.in_slot(child.slot):
                supervisor.start(child.slot)  # a reload stops first and starts then
            supervisor.roll.next()
        elif supervisor.older(child):
            why = child.describe_end(code)
            logger.error("replacement of worker %d failed, the old one goes on: %s", child.slot + 1, why)
            _log_trace(child.trace)
            supervisor.roll.abort(child.slot)
        else:
            self._note_crash(child, state, code)

    def _note_crash(self, child: Child, state: ChildState, code: int) -> None:
        supervisor = self._supervisor
        booting = supervisor.watcher is not None or supervisor.machine.state is SupervisorState.BOOTING
        if state is ChildState.STARTING and booting:
            self.cannot_start(child.describe_end(code), child.trace, code)
            return
        killed, self._oom_kills = oom_kills() - self._oom_kills, oom_kills()
        hint = ", out of memory" if killed and code == -signal.SIGKILL else ""
        why, work = child.describe_end(code) + hint, child.describe_work(supervisor.crew.records(child))
        logger.error("worker %s died: %s; requests in flight: %s", child, why, work)
        now = time.monotonic()
        wait = self.restarts.note_crash(child.slot, now, now - child.born_s)
        if wait is None:
            logger.critical("workers crash too often: giving up")
            self.exit_code = _EXIT_GAVE_UP
            supervisor.stop()
        elif not supervisor.crew.serving(child.slot):
            supervisor.start_at[child.slot] = now + wait
        supervisor.roll.note_crash(child)

    def cannot_start(self, why: str, trace: str, code: int) -> None:
        """A worker, or what workers are forked from, has failed before anything served."""
        logger.error("cannot start: %s", why)
        self._supervisor.inheritance.tell_failure(why)
        _log_trace(trace)
        if self._supervisor.watcher is None:
            self.exit_code = code if code in (_EXIT_SETTINGS, _EXIT_BOOT) else _EXIT_BOOT
            self._supervisor.stop()


def _log_trace(trace: str) -> None:
    if trace:
        logger.debug("%s", trace.rstrip())
