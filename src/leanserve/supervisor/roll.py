"""Replacing workers: which slots wait for a successor, and when the next one may start."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable

from leanserve.settings import RollSettings
from leanserve.supervisor.child import Child, ChildState
from leanserve.supervisor.crew import Crew
from leanserve.supervisor.states import SupervisorMachine, SupervisorMove, SupervisorState

__all__ = ["Roll"]

logger = logging.getLogger("leanserve")


class Roll:
    """Replaces workers, a few at a time.

    A slot is under way from the start of its successor (start-first) or the farewell to its old worker
    (stop-first) until one worker that is ready has the slot to itself.

    Args:
        settings: the strategy, and how many successors may be under way.
        crew: the workers.
        machine: of the service: it is ROLLING while a slot waits or is under way.
        start: starts a worker in a slot, beside the one that is there.
        end_s: when a worker that is told to leave now has had its time.
    """

    def __init__(
        self,
        settings: RollSettings,
        crew: Crew,
        machine: SupervisorMachine,
        start: Callable[[int], None],
        end_s: Callable[[Child], float],
    ) -> None:
        self._stops_first = settings.roll_strategy == "stop-first"
        self._most = 1 if self._stops_first else settings.max_surge
        self._crew = crew
        self._machine = machine
        self._start = start
        self._end_s = end_s
        self._queue: deque[int] = deque()
        self._worn: deque[int] = deque()
        self._under_way: set[int] = set()

    def __repr__(self) -> str:
        return f"<Roll {len(self._queue)} wait, {len(self._worn)} worn, {len(self._under_way)} under way>"

    # What is wanted

    def replace_all(self, slots: Iterable[int]) -> None:
        """Give each of these slots a successor, as many at a time as the settings say."""
        self._queue.extend(slot for slot in slots if slot not in self._queue)
        self._begin()

    def renew(self, child: Child) -> None:
        """A worker asks for a successor, perhaps again. Of these there is one at a time."""
        alone = self._crew.serving(child.slot) == [child]
        if alone and child.slot not in (*self._queue, *self._worn):
            self._worn.append(child.slot)
            self._begin()

    def _begin(self) -> None:
        if self._machine.accepts(SupervisorMove.ROLL):
            self._machine.advance(SupervisorMove.ROLL)
            self.next()
        else:
            self.clear()

    # What has happened

    def next(self) -> None:
        """Something has changed: begin with the slots that may go now."""
        self._under_way = {slot for slot in self._under_way if not self._has_ended(slot)}
        while self._machine.state is SupervisorState.ROLLING:
            busy = len(self._under_way)
            if self._queue and busy < self._most:
                waiting = self._queue
            elif self._worn and not busy:
                waiting = self._worn
            elif busy:
                return
            else:
                self._machine.advance(SupervisorMove.ROLLED)
                return
            if len(self._crew.in_slot(waiting[0])) > 1:
                return  # somebody leaves there: there is no record for a third one
            self._replace(waiting.popleft())

    def _replace(self, slot: int) -> None:
        old = self._crew.serving(slot)
        if not old:
            return  # it has crashed, and is started anew anyway; or there is no such slot any more
        if slot in self._worn:
            self._worn.remove(slot)
        self._under_way.add(slot)
        if self._stops_first:
            for child in old:
                child.retire("retire", self._end_s(child))
        else:
            self._start(slot)

    def _has_ended(self, slot: int) -> bool:
        return [child.state for child in self._crew.in_slot(slot)] == [ChildState.READY]

    def note_crash(self, child: Child) -> None:
        """A worker has died. If it was a successor the roll is over: what comes next would die as well."""
        others = [other.generation for other in self._crew.in_slot(child.slot)]
        newest = not others or max(others) < child.generation
        if newest and (others or child.slot in self._under_way):
            self.abort(child.slot)
        self.next()

    def forget(self, slot: int) -> None:
        """The slot is taken away."""
        self._under_way.discard(slot)
        self.next()

    # The end

    def abort(self, slot: int) -> None:
        """A successor has failed: what waits stays as it is, and only what is under way is finished."""
        if self._queue or self._worn:
            logger.error("%d more workers stay as they are", len({*self._queue, *self._worn}))
        self._queue.clear()
        self._worn.clear()
        self._under_way.discard(slot)
        self.next()

    def cancel(self) -> str:
        """An operator wants no more of it: successors that boot leave, the old ones go on; what was done."""
        if self._machine.state is not SupervisorState.ROLLING:
            return "no worker is being replaced"
        spared = len({*self._queue, *self._worn})
        for slot in self._under_way:
            old, successor = self._crew.serving(slot)[:-1], self._crew.in_slot(slot)[-1:]
            if old and successor[0].state is ChildState.STARTING:
                successor[0].retire("retire", self._end_s(successor[0]))
                spared += 1
        self.clear()
        self._machine.advance(SupervisorMove.ROLLED)
        return f"{spared} worker{'' if spared == 1 else 's'} not replaced"

    def clear(self) -> None:
        """Nothing is replaced any more."""
        self._queue.clear()
        self._worn.clear()
        self._under_way.clear()
