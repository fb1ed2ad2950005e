"""The worker processes: one per slot, and for the time of a replacement two."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from leanserve.channel import Channel, WorkerSpec
from leanserve.errors import SettingsError
from leanserve.flight import FlightRecords
from leanserve.listeners import Listeners
from leanserve.scoreboard import Record, Scoreboard
from leanserve.settings import Settings
from leanserve.supervisor.child import Child, ChildState, fork_worker, spawn_worker
from leanserve.supervisor.queues import measure
from leanserve.supervisor.signals import SignalQueue
from leanserve.tokens import Tokens

__all__ = ["Crew"]


class Crew:
    """Starts worker processes and knows which belongs where.

    Args:
        app: an import string, or the application itself when workers are forked.
        settings: all settings.
        listeners: the sockets of all slots.
        signals: what a forked child has to leave behind.
        entry: dotted name of the function that a worker process runs.
        loops: workers of one process; it takes as many slots, from that of the child on.

    Attributes:
        fork: forks a worker, with `preload`.
        leave_templates: called in whatever is forked: what it has to leave behind of `preload`.
        leave_more: called in a forked worker: what it has to leave behind that is not the crew's.
        leave_upgrade: the same, in every forked process, for the channel between two supervisors.

    Raises:
        SettingsError: the limits of admission are larger than what can be counted here.
    """

    def __init__(
        self,
        app: Any,
        settings: Settings,
        listeners: Listeners,
        signals: SignalQueue,
        entry: str,
        loops: int = 1,
    ) -> None:
        self.loops = loops
        self.children: dict[int, Child] = {}
        limits = settings.admission
        self.scoreboard = Scoreboard.create()
        self.flights = FlightRecords(self.scoreboard.fd)
        self.tokens: list[Tokens] = []
        if limits.max_concurrent_requests is not None:
            self.tokens = [Tokens.create(limits.max_concurrent_requests), Tokens.create(limits.max_queue)]
        self._app = app
        self._settings = settings
        self._listeners = listeners
        self._signals = signals
        self._entry = entry
        self._generations: dict[int, int] = {}
        self.fork: Callable[[WorkerSpec], int] | None = None
        self.leave_templates: Callable[[], None] = lambda: None
        self.leave_more: Callable[[], None] = lambda: None
        self.leave_upgrade: Callable[[], None] = lambda: None

    def reconfigure(self, settings: Settings, in_place: dict[str, Any]) -> None:
        """Have new workers begin with `settings`, and tell those that there are what changes in place."""
        self._settings = settings
        for child in self.children.values():
            child.channel.send({"set": in_place})

    @property
    def restarts(self) -> int:
        """How many workers were started in a slot that had had one."""
        return sum(self._generations.values())

    def start(self, slot: int) -> Child:
        """Start a worker for a slot that has none, or beside the one that it is to replace."""
        generation = self._generations.get(slot, -1) + 1
        self._generations[slot] = generation
        taken = {child.lane for child in self.in_slot(slot)}
        ours, theirs = Channel.pair()
        spec = WorkerSpec(
            app=self._app,
            settings=self._settings,
            slot=slot,
            generation=generation,
            listeners=[self._listeners.sockets(index) for index in range(slot + self.loops)],
            shared=self._listeners.shared,
            channel=theirs,
            scoreboard_fd=self.scoreboard.fd,
            tokens=tuple(tokens.fds for tokens in self.tokens),
            lane=0 if 0 not in taken else 1,
            parent_pid=os.getpid(),
            born_s=time.monotonic(),
            loops=self.loops,
        )
        try:
            if self.fork is not None:
                pid = self.fork(spec)
            elif self._settings.pool.start_method == "spawn":
                pid = spawn_worker(spec, self._entry)
            else:
                pid = fork_worker(spec, self._entry, lambda: self.leave_in_child(ours))
        except (OSError, SettingsError):
            ours.close()
            raise
        finally:
            theirs.close()
        child = Child(pid, slot, generation, spec.lane, ours, spec.born_s, loops=self.loops)
        self.children[pid] = child
        return child

    def leave_in_child(self, ours: Channel | None, *, but_more: bool = False) -> None:
        """In a forked child: the parent's ends of the channels; `but_more` spares what `leave_more` leaves.

        An end that a sibling holds would keep this pair alive when the supervisor dies, and hide its death.
        """
        if not but_more:
            self.leave_more()
        self.leave_templates()
        self.leave_upgrade()
        if ours is not None:
            ours.close()
        for child in self.children.values():
            child.channel.close()
        self._signals.leave_in_child()

    def measure_queues(self) -> list[dict[str, Any]]:
        """As :func:`leanserve.supervisor.queues.measure`, of all slots that there should be."""
        return measure(self._listeners, self.scoreboard.read_server().slots)

    def in_slot(self, slot: int) -> list[Child]:
        """The slot's workers, oldest first."""
        found = [child for child in self.children.values() if slot in child.slots]
        return sorted(found, key=lambda child: child.generation)

    def serving(self, slot: int) -> list[Child]:
        """Those of them that nobody has told to leave."""
        return [child for child in self.in_slot(slot) if child.state <= ChildState.READY]

    def records(self, child: Child) -> list[Record]:
        """What its workers have written on the scoreboard, those that lived long enough for that."""
        found = (self.scoreboard.read(slot, child.lane) for slot in child.slots)
        return [record for record in found if record.pid == child.pid]

    def record(self, child: Child) -> Record | None:
        """The first of them, or None."""
        return next(iter(self.records(child)), None)

    def take_ended(self) -> list[tuple[Child, int]]:
        """The children that have ended, each with its exit code; they are this crew's no longer."""
        ended = []
        for child in list(self.children.values()):
            code = child.wait()
            if code is not None:
                del self.children[child.pid]
                self._reclaim(child)
                for slot in child.slots:
                    child.flights += self.flights.take(slot, child.lane)
                    self.scoreboard.bury(slot, child.lane, child.pid)
                ended.append((child, code))
        return ended

    def _reclaim(self, child: Child) -> None:
        """Give the tokens back that a worker held at its end: what it had noted, or, when nobody is left who
        could hold one, all that are taken."""
        records = self.records(child)
        noted = sum(each.slots_held for each in records), sum(each.places_held for each in records)
        for tokens, held in zip(self.tokens, noted, strict=False):
            tokens.give(held if self.children else tokens.taken())

    def close(self) -> None:
        """Give scoreboard and tokens back. No child is left by then."""
        self.scoreboard.close()
        for tokens in self.tokens:
            tokens.close()
