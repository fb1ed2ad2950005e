"""What operators ask of the supervisor; the admin process brings it. Each order may be given twice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from leanserve.channel import DUMP_SIGNAL
from leanserve.scoreboard import MAX_SLOTS
from leanserve.supervisor.size import FIXED
from leanserve.supervisor.states import SupervisorState, check_serving

if TYPE_CHECKING:
    from leanserve.supervisor.supervisor import Supervisor

__all__ = ["Orders"]

logger = logging.getLogger("leanserve")


class Orders:
    """Runs the orders of one supervisor."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._known: dict[str, Callable[[int], str]] = {
            "reload": self._reload,
            "config": self._config,
            "workers": self._workers,
            "drain": self._drain,
            "hurry": self._hurry,
            "dump": self._dump,
            "abort": self._abort,
            "upgrade": lambda _number: supervisor.upgrade.start(),
        }

    def obey(self, order: str, number: int) -> str:
        """Run an order; what is done now. Raises ValueError: why it is not."""
        handler = self._known.get(order)
        if handler is None:
            raise ValueError(f"there is no order {order!r}")
        logger.info("order: %s%s", order, f" {number}" if number else "")
        return handler(number)

    def _reload(self, _number: int) -> str:
        self._check_running()
        self._supervisor.roll_all()
        return f"replacing {self._supervisor.slots} workers, one after the other"

    def _config(self, _number: int) -> str:
        self._check_running()
        return self._supervisor.reconfigure()

    def _abort(self, _number: int) -> str:
        self._check_running()
        return self._supervisor.roll.cancel()

    def _workers(self, number: int) -> str:
        self._check_running()
        if not 1 <= number <= MAX_SLOTS:
            raise ValueError(f"workers: a number from 1 to {MAX_SLOTS}, not {number}")
        supervisor = self._supervisor
        if supervisor.has_threads and supervisor.slots != number:
            raise ValueError(f"there are {supervisor.slots} workers, and {FIXED}")
        while supervisor.slots != number:
            before = supervisor.slots
            (supervisor.size.add if number > before else supervisor.size.remove)()
            if supervisor.slots == before:
                raise ValueError(f"there are {before} workers, and no more can be had; the log says why")
        return f"{number} workers"

    def _check_running(self) -> None:
        check_serving(self._supervisor.machine.state)

    def _drain(self, _number: int) -> str:
        if self._supervisor.machine.state is not SupervisorState.STOPPING:
            self._supervisor.stop()
        limit = self._supervisor.settings.drain.drain_timeout
        return f"stopping: what runs gets up to {limit:g} s to finish"

    def _hurry(self, _number: int) -> str:
        self._drain(0)
        self._supervisor.stop()
        return "stopping at once"

    def _dump(self, number: int) -> str:
        """Have workers write the stacks of their threads to stderr; `number` is that of one, or 0."""
        crew = self._supervisor.crew
        found = []
        for child in crew.in_slot(number - 1) if number else crew.children.values():
            if crew.record(child) is not None:
                child.signal(DUMP_SIGNAL)
                found.append(child.slot + 1)
        if not found:
            raise ValueError(f"no worker {number or ''} that could write its stacks")
        return f"stacks of worker {', '.join(map(str, sorted(found)))} go to the log (stderr)"
