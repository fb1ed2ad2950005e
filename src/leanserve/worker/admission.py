"""Which requests are at work, which wait for their turn, and which are refused."""

from __future__ import annotations

import asyncio
import math
import weakref
from collections.abc import Callable, Hashable
from enum import IntEnum
from time import monotonic
from typing import Any

from leanserve.asgi.cancellation import CANCELLATION
from leanserve.asgi.messages import App
from leanserve.settings import AdmissionSettings
from leanserve.worker.queue import FairQueue
from leanserve.worker.slots import Slots

__all__ = ["Admission", "overloaded"]

# The weight of the newest request in the average time that a request is at work.
_NEWEST = 0.1
_MAX_RETRY_S = 300


class _Outcome(IntEnum):
    """How waiting ended."""

    ADMITTED = 0
    REFUSED = 1
    GONE = 2  # the client has left


class _Waiter:
    """One request in the queue.

    Attributes:
        key: whose turn it needs.
        ended: resolved when the outcome is known.
    """

    __slots__ = ("ended", "key", "outcome")

    def __init__(self, key: Hashable, ended: asyncio.Future[None]) -> None:
        self.key = key
        self.ended = ended
        self.outcome = _Outcome.GONE

    def settle(self, outcome: _Outcome) -> None:
        """Tell the request what became of it."""
        self.outcome = outcome
        if not self.ended.done():  # its task may have been cancelled
            self.ended.set_result(None)


class Admission:
    """Stands in front of the application: it is called when there is a slot, or not at all.

    Args:
        settings: what is counted and how long it may wait.
        slots: for requests and WebSockets at work: from the call of the application until it returns.
        places: for those that wait.
        root_path: what stands in front of the paths of the application.
        on_refused: called with each request that is refused.

    Attributes:
        longest_wait_s: ``queue_timeout``, for those who begin to wait.

    What is promised: no more than the slots are at work and no more than the places wait, in all workers that
    share them; nobody is refused while a slot or a place is free; the application is not called for a client
    that has left the queue. Within a worker, who came first is first, or with ``fair_by`` the first of each
    key in turn; and there, when no place is left, the last in the longest line has to make room for a key
    with at least two fewer. Between workers there is no common order: a freed slot goes to whichever asks
    first, and a worker that frees one while others wait, too, lets them ask first.
    """

    def __init__(
        self,
        settings: AdmissionSettings,
        slots: Slots,
        places: Slots,
        *,
        root_path: str = "",
        on_refused: Callable[[], None] = lambda: None,
    ) -> None:
        self._slots = slots
        self._places = places
        self._fair_by = settings.fair_by.lower().encode("latin-1") if settings.fair_by else b""
        self._exempt = {root_path + path for path in settings.limit_exempt if path}
        self.longest_wait_s = settings.queue_timeout
        self._on_refused = on_refused
        self._queue: FairQueue[_Waiter] = FairQueue()
        self._waiters: dict[asyncio.Task[Any], _Waiter] = {}
        self._gone: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        self._work_s = 0.0  # how long a request is at work, on average

    def __repr__(self) -> str:
        at_work, waiting = self._slots.taken(), self._places.taken()
        return f"<Admission {at_work} at work, {waiting} waiting, {len(self._queue)} of them here>"

    def guard(self, app: App) -> App:
        """The application as exchanges see it."""

        async def guarded(scope: Any, receive: Any, send: Any) -> None:
            http = scope["type"] == "http"
            if http and scope["path"] in self._exempt:
                await app(scope, receive, send)
                return
            if self._queue or not self._slots.take():
                outcome = await self._wait_turn(scope)
                if outcome is _Outcome.REFUSED:
                    self._on_refused()
                    await overloaded(scope, send, self.retry_after_s())
                if outcome is not _Outcome.ADMITTED:
                    return
            begun = monotonic()
            try:
                await app(scope, receive, send)
            finally:
                if http:  # a WebSocket may last for hours, which says nothing about requests
                    self._measure(monotonic() - begun)
                self._release()

        return guarded

    def leave(self, task: asyncio.Task[Any]) -> None:
        """The client of this task is gone: if it waits, or is about to, the application is not called."""
        waiter = self._waiters.get(task)
        if waiter is None:
            self._gone.add(task)  # it may be told before it has begun
        elif self._withdraw(waiter, _Outcome.GONE):
            pass
        elif waiter.outcome is _Outcome.ADMITTED:  # its turn has come, but it has not run since
            waiter.outcome = _Outcome.GONE
            self._release()

    def retry_after_s(self) -> int:
        """In how many seconds a refused request should come again."""
        return min(max(math.ceil(self._expected_wait_s()), 1), _MAX_RETRY_S)

    def _expected_wait_s(self) -> float:
        """When a request that comes now would have its turn, as far as one can tell: from the average time at
        work in this worker, the requests that wait in all workers, and the slots."""
        return self._work_s * (self._places.taken() + 1) / self._slots.limit

    def _measure(self, seconds: float) -> None:
        self._work_s += (seconds - self._work_s) * (_NEWEST if self._work_s else 1)

    # In

    async def _wait_turn(self, scope: Any) -> _Outcome:
        task = asyncio.current_task()
        assert task is not None
        if task in self._gone:
            return _Outcome.GONE
        timeout_s = scope["extensions"][CANCELLATION].get("timeout")
        if timeout_s is not None and self._expected_wait_s() > timeout_s:
            return _Outcome.REFUSED  # its time would be over before it begins
        key = self._key(scope)
        if not self._take_place(key):
            return _Outcome.REFUSED
        return await self._wait(task, key)

    def _key(self, scope: Any) -> Hashable:
        if self._fair_by == b"client":
            return scope["client"][0] if scope["client"] else None
        if self._fair_by:
            return next((value for name, value in scope["headers"] if name == self._fair_by), None)
        return None

    def _take_place(self, key: Hashable) -> bool:
        if self._places.take():
            return True
        self._admit()  # a slot may be free while the loop has not told us yet
        if self._places.take():
            return True
        crowded = self._queue.most_crowded(key) if self._fair_by else None
        if crowded is None:
            return False
        self._queue.remove(*crowded)
        crowded[1].settle(_Outcome.REFUSED)  # and its place is the newcomer's
        return True

    async def _wait(self, task: asyncio.Task[Any], key: Hashable) -> _Outcome:
        loop = asyncio.get_running_loop()
        waiter = self._waiters[task] = _Waiter(key, loop.create_future())
        self._queue.add(key, waiter)
        self._slots.watch(self._admit)
        timer = None
        if self.longest_wait_s is not None:
            timer = loop.call_later(self.longest_wait_s, self._withdraw, waiter, _Outcome.REFUSED)
        try:
            await waiter.ended
        except asyncio.CancelledError:
            self.leave(task)
            raise
        finally:
            del self._waiters[task]
            if timer is not None:
                timer.cancel()
        return waiter.outcome

    # On and out

    def _admit(self) -> None:
        """Take the slots that are free for those who wait."""
        while self._queue and self._slots.take():
            self._next()

    def _next(self) -> None:
        """The slot that is taken is for the next in the queue."""
        self._queue.take().settle(_Outcome.ADMITTED)
        self._free_place()

    def _withdraw(self, waiter: _Waiter, outcome: _Outcome) -> bool:
        """Take one out of the queue; False when it is not there any more."""
        if not self._queue.remove(waiter.key, waiter):
            return False
        waiter.settle(outcome)
        self._free_place()
        return True

    def _free_place(self) -> None:
        self._places.give()
        if not self._queue:
            self._slots.unwatch()

    def _release(self) -> None:
        """A slot is free again. It stays in this worker if nobody waits in another."""
        if self._queue and self._places.taken() <= len(self._queue):
            self._next()
            return
        self._slots.give()
        self._slots.give_way()


async def overloaded(scope: Any, send: Any, retry_after_s: int) -> None:
    """What answers in the application's place: 503, before anything is read."""
    prefix = "websocket.http" if scope["type"] == "websocket" else "http"
    body = b"Service Unavailable"
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", b"%d" % len(body)),
        (b"retry-after", b"%d" % retry_after_s),
    ]
    await send({"type": f"{prefix}.response.start", "status": 503, "headers": headers})
    await send({"type": f"{prefix}.response.body", "body": body})
