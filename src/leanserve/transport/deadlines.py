"""All deadlines of a worker behind one timer of the event loop.

A keep-alive connection moves its deadline twice per request. Arming and cancelling a loop timer each time
costs more than the request line; here a move is one attribute write, and an entry is looked at again only
when the time it was queued for has come.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from math import inf
from typing import Any, Protocol

__all__ = ["NEVER", "Deadlines", "Entry"]

#: The deadline of an entry that waits for nothing.
NEVER = inf


class Entry(Protocol):
    """What can have a deadline.

    Attributes:
        deadline: loop time in seconds, or NEVER.
        queue_item: the entry's place in the heap; Deadlines alone touches it.
    """

    deadline: float
    queue_item: list[Any] | None

    def deadline_reached(self) -> None:
        """Called once the deadline has passed; it may set a new one."""


class Deadlines:
    """A heap of ``[when, order, entry]``, each entry in it once, at the earliest time that concerns it.

    Args:
        now: the loop's clock, monotonic seconds.
        call_at: the loop's ``call_at``; its handle has ``cancel()``.
    """

    __slots__ = ("_armed_for", "_call_at", "_forgotten", "_handle", "_heap", "_order", "now")

    def __init__(self, now: Callable[[], float], call_at: Callable[[float, Callable[[], None]], Any]) -> None:
        self.now = now
        self._call_at = call_at
        self._heap: list[list[Any]] = []
        self._order = itertools.count()
        self._forgotten = 0
        self._handle: Any = None
        self._armed_for = NEVER

    def set(self, entry: Entry, seconds: float) -> None:
        """Give `entry` a deadline `seconds` from now, replacing the one it had."""
        entry.deadline = when = self.now() + seconds
        item = entry.queue_item
        if item is None:
            self._queue(entry, when)
        elif when < item[0]:
            self.forget(entry)
            entry.deadline = when
            self._queue(entry, when)

    def forget(self, entry: Entry) -> None:
        """Take the deadline away and let go of `entry`: the heap keeps no closed connection alive."""
        entry.deadline = NEVER
        if entry.queue_item is not None:
            entry.queue_item[2] = None
            entry.queue_item = None
            self._forgotten += 1
            if self._forgotten > 64 and self._forgotten * 2 > len(self._heap):
                self._heap = [item for item in self._heap if item[2] is not None]
                heapq.heapify(self._heap)
                self._forgotten = 0

    def close(self) -> None:
        """Drop the loop timer and every entry."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        for item in self._heap:
            if item[2] is not None:
                item[2].queue_item = None
        self._heap.clear()
        self._forgotten = 0
        self._armed_for = NEVER

    def __len__(self) -> int:
        return len(self._heap) - self._forgotten

    def _queue(self, entry: Entry, when: float) -> None:
        entry.queue_item = [when, next(self._order), entry]
        heapq.heappush(self._heap, entry.queue_item)
        if when < self._armed_for:
            self._arm(when)

    def _arm(self, when: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._armed_for = when
        self._handle = self._call_at(when, self._tick)

    def _tick(self) -> None:
        now = self.now()
        self._armed_for = NEVER
        self._handle = None
        try:
            while self._heap and self._heap[0][0] <= now:
                entry: Entry | None = heapq.heappop(self._heap)[2]
                if entry is None:
                    self._forgotten -= 1
                    continue
                entry.queue_item = None
                if entry.deadline <= now:
                    entry.deadline = NEVER
                    entry.deadline_reached()
                elif entry.deadline != NEVER:
                    self._queue(entry, entry.deadline)
        finally:  # a fault of one must not stop the time of all
            if self._heap and self._heap[0][0] < self._armed_for:
                self._arm(self._heap[0][0])
