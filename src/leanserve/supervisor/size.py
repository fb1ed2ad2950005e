"""One worker more, one worker less."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from leanserve.scoreboard import MAX_SLOTS
from leanserve.supervisor.states import SupervisorState

if TYPE_CHECKING:
    from leanserve.supervisor.supervisor import Supervisor

__all__ = ["FIXED", "Size"]

logger = logging.getLogger("leanserve")

#: Why it cannot be changed.
FIXED = "with worker_kind thread their number is fixed: start the server anew with another"


class Size:
    """The number of a supervisor's slots while it runs."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def _may_change(self) -> bool:
        supervisor = self._supervisor
        if supervisor.upgrade.under_way or not supervisor.inheritance.owner:
            logger.error("an upgrade is under way: the number of workers stays until it is over")
            return False
        if supervisor.has_threads:
            logger.error("the number of workers stays: %s", FIXED)
            return False
        return supervisor.machine.state in (SupervisorState.RUNNING, SupervisorState.ROLLING)

    def add(self) -> None:
        """Open a slot and start its worker, or say why not."""
        supervisor = self._supervisor
        if self._may_change():
            if supervisor.slots == MAX_SLOTS:
                logger.error("no worker added: there are %d, the most that one server can have", MAX_SLOTS)
                return
            try:
                supervisor.listeners.open_slot(supervisor.slots)
            except OSError as error:
                logger.error("no worker added: %s", error)
                return
            supervisor.slots += 1
            logger.info("adding worker %d", supervisor.slots)
            supervisor.start(supervisor.slots - 1)

    def remove(self) -> None:
        """Have the last slot's workers finish and leave, or say why not."""
        supervisor = self._supervisor
        if supervisor.slots == 1:
            logger.warning("the last worker stays; stop the server with SIGTERM")
        elif self._may_change():
            logger.info("removing worker %d", supervisor.slots)
            supervisor.slots -= 1
            self._close(supervisor.slots)

    def _close(self, slot: int) -> None:
        supervisor, listeners = self._supervisor, self._supervisor.listeners
        supervisor.aim()  # before its listeners drop what comes
        supervisor.start_at.pop(slot, None)
        children = supervisor.crew.in_slot(slot)
        for child in children:
            child.retire("leave", supervisor.last_moment(child))
        # The slot's own listeners end with the worker that empties their queues; the slot may be back before
        # that, with new ones.
        booted = [child for child in children if child.booted]
        for child in (booted or children)[:1]:
            child.listeners = listeners.detach_slot(slot)
        listeners.refuse(slot)
        listeners.close_slot(slot)
        supervisor.roll.forget(slot)
