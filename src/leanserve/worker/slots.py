"""How many may do something at once: counted in this process, or in the whole pool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from leanserve.scoreboard import Lane
from leanserve.settings import AdmissionSettings
from leanserve.tokens import Tokens

__all__ = ["PoolSlots", "Slots", "SoleSlots", "make_slots"]

# How long a freed slot is left to the other workers that wait for one, before this worker asks for it again.
_TURN_S = 0.002


class Slots(Protocol):
    """A number of places, each of which one request may hold."""

    @property
    def limit(self) -> int:
        """How many there are."""

    def take(self) -> bool:
        """Take one; False when none is free."""

    def give(self) -> None:
        """Give one back."""

    def taken(self) -> int:
        """How many are held now, in all workers."""

    def watch(self, callback: Callable[[], None]) -> None:
        """Have `callback` called, until :meth:`unwatch`, whenever another worker may have given one back."""

    def unwatch(self) -> None:
        """Nobody waits here any longer."""

    def give_way(self) -> None:
        """While it is watched: leave the next free one to another worker, if that takes it soon."""


class SoleSlots:
    """Slots of a process that serves alone; nobody else gives one back."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._taken = 0

    def take(self) -> bool:
        """Take one; False when none is free."""
        if self._taken >= self.limit:
            return False
        self._taken += 1
        return True

    def give(self) -> None:
        """Give one back."""
        self._taken -= 1

    def taken(self) -> int:
        """How many are held now."""
        return self._taken

    def watch(self, callback: Callable[[], None]) -> None:
        """Nothing to watch."""

    def unwatch(self) -> None:
        """Nothing was watched."""

    def give_way(self) -> None:
        """There is nobody to give way to."""


class PoolSlots:
    """Slots that all workers share.

    Args:
        tokens: of the pool.
        hold: notes on the scoreboard how many more (or fewer) this worker holds, so that the supervisor can
            give them back when it dies.

    A token is noted after it was taken, and struck out before it is given back. A worker that is killed in
    between loses one: the limit is then one lower, never one higher, until no worker of the pool is left.
    """

    def __init__(self, tokens: Tokens, hold: Callable[[int], None]) -> None:
        self._tokens = tokens
        self._hold = hold
        self._callback: Callable[[], None] | None = None
        self._pause: asyncio.TimerHandle | None = None

    @property
    def limit(self) -> int:
        """How many there are in the pool."""
        return self._tokens.limit

    def take(self) -> bool:
        """Take one; False when none is free."""
        if not self._tokens.take():
            return False
        self._hold(1)
        return True

    def give(self) -> None:
        """Give one back."""
        self._hold(-1)
        self._tokens.give()

    def taken(self) -> int:
        """How many are held now, in all workers."""
        return self._tokens.taken()

    def watch(self, callback: Callable[[], None]) -> None:
        """Have the loop look at the pipe. A token wakes all workers that watch; one of them gets it."""
        if self._callback is None:
            self._callback = callback
            self._resume()

    def unwatch(self) -> None:
        """Nobody waits here any longer."""
        if self._callback is not None:
            self._stop_reading()
            self._callback = None

    def give_way(self) -> None:
        """Do not look at the pipe for a moment: the worker that gives a token back is awake, and would
        always be the first to take it again."""
        if self._callback is not None and self._pause is None:
            self._stop_reading()
            self._pause = asyncio.get_running_loop().call_later(_TURN_S, self._resume)

    def _resume(self) -> None:
        assert self._callback is not None
        self._pause = None
        asyncio.get_running_loop().add_reader(self._tokens.fds[0], self._callback)

    def _stop_reading(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        else:
            asyncio.get_running_loop().remove_reader(self._tokens.fds[0])


def make_slots(
    settings: AdmissionSettings, lane: Lane | None, token_fds: Sequence[tuple[int, int]]
) -> tuple[Slots, Slots]:
    """For the requests at work, and for those that wait: the pool's when it has some, else our own."""
    at_work, waiting = settings.max_concurrent_requests or 0, settings.max_queue
    if lane is None or not token_fds:
        return SoleSlots(at_work), SoleSlots(waiting)
    return (
        PoolSlots(Tokens(at_work, token_fds[0]), lane.hold_slots),
        PoolSlots(Tokens(waiting, token_fds[1]), lane.hold_places),
    )
