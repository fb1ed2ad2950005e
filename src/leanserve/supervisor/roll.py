"""Replacing workers: which slots wait for a successor, and when the next one may start."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable

from leanserve.supervisor.crew import Crew
from leanserve.supervisor.states import SupervisorMachine, SupervisorMove, SupervisorState

__all__ = ["Roll"]

logger = logging.getLogger("leanserve")


class Roll:
    """Replaces workers one at a time.

    Args:
        crew: the workers.
        machine: of the service: it is ROLLING while a slot waits or is being replaced.
        start: starts a worker in a slot, beside the one that is there.
    """

    def __init__(self, crew: Crew, machine: SupervisorMachine, start: Callable[[int], None]) -> None:
        self._crew = crew
        self._machine = machine
        self._start = start
        self._queue: deque[int] = deque()

    def __repr__(self) -> str:
        return f"<Roll {len(self._queue)} wait>"

    def replace(self, slot: int) -> None:
        """Put a slot in the queue of those whose worker gets a successor."""
        if slot not in self._queue and self._machine.accepts(SupervisorMove.ROLL):
            self._queue.append(slot)
            self._machine.advance(SupervisorMove.ROLL)
            self.next()

    def replace_all(self, slots: Iterable[int]) -> None:
        """The same for several."""
        for slot in slots:
            self.replace(slot)

    def next(self) -> None:
        """Start the next successor, unless one replacement is still under way: one extra worker at most."""
        if self._machine.state is not SupervisorState.ROLLING or self._replacing():
            return
        while self._queue:
            slot = self._queue.popleft()
            if self._crew.serving(slot):  # and not of a slot that is no more
                self._start(slot)
                return
        self._end()

    def _replacing(self) -> bool:
        """Whether a slot has an old worker and a new one. One that was taken away has none that serves."""
        slots = {child.slot for child in self._crew.children.values()}
        return any(len(self._crew.in_slot(slot)) > 1 and self._crew.serving(slot) for slot in slots)

    def abort(self) -> None:
        """What waits stays as it is."""
        if self._queue:
            logger.error("%d more workers stay as they are", len(self._queue))
        self._queue.clear()
        self._end()

    def clear(self) -> None:
        """The service stops: nothing is replaced any more."""
        self._queue.clear()

    def _end(self) -> None:
        if self._machine.state is SupervisorState.ROLLING:
            self._machine.advance(SupervisorMove.ROLLED)
