"""``worker_kind=thread``: the workers of one process, each an event loop in a thread of its own.

Each has a slot: its own listeners, its record on the scoreboard, its lifespan, drain and watchdog. What they
share is the process: the application as it was imported, and the memory. The main thread serves nothing. It
hears the supervisor and hands on what it says.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from leanserve.channel import Channel, WorkerSpec
from leanserve.errors import BootFailed
from leanserve.flight import FlightRecorder
from leanserve.scoreboard import Lane
from leanserve.worker.process import (
    Orders,
    loop_factory,
    obey_farewell,
    tell_closed,
    tell_full,
    tell_running,
    tell_wants,
)  # fmt: skip
from leanserve.worker.wakeups import Wakeups
from leanserve.worker.worker import Worker

__all__ = ["serve"]

logger = logging.getLogger("leanserve")


class _Loop(threading.Thread):
    """One worker and its event loop.

    Attributes:
        loaded, ready: in the main loop; done when its application is up and when it accepts, or with what
            its start raised.
        ended: in the main loop; done when the thread is through, with an exception or None.
    """

    def __init__(
        self, spec: WorkerSpec, place: int, app: Any, lane: Lane | None,
        recorder: FlightRecorder | None,
    ) -> None:  # fmt: skip
        super().__init__(name=f"leanserve-worker-{spec.slot + place + 1}", daemon=True)
        self.slot = spec.slot + place
        self._spec = spec
        self._app = app
        self._lane = lane
        self._recorder = recorder
        self._wakeups = Wakeups()
        self._main = asyncio.get_running_loop()
        self.loaded: asyncio.Future[None] = self._main.create_future()
        self.ready: asyncio.Future[None] = self._main.create_future()
        self.ended: asyncio.Future[BaseException | None] = self._main.create_future()

    _loop: asyncio.AbstractEventLoop
    _worker: Worker
    _order: asyncio.Future[str]
    _turn: asyncio.Future[None]

    def run(self) -> None:
        """The thread's main."""
        error: BaseException | None = None
        try:
            with asyncio.Runner(loop_factory=loop_factory(self._spec.settings.worker.loop)) as runner:
                runner.run(self._live())
        except BaseException as raised:  # noqa: BLE001 - raised anew in the main thread
            error = raised
        self._in_main(self._tell_end, error)

    async def _live(self) -> None:
        spec = self._spec
        self._loop = asyncio.get_running_loop()
        self._order, self._turn = self._loop.create_future(), self._loop.create_future()
        self._worker = Worker(
            self._app,
            spec.settings,
            spec.listeners[self.slot],
            on_full=lambda: self._in_main(tell_full, spec.channel),
            on_wants=lambda: self._in_main(tell_wants, spec.channel),
            on_closed=lambda: self._in_main(tell_closed, spec.channel),
            lane=self._lane,
            recorder=self._recorder,
            token_fds=spec.tokens,
            wakeups=self._wakeups,
            shared=spec.shared,
        )
        await self._worker.start(self._wait_turn)
        self._in_main(self.ready.set_result, None)
        order = await self._order
        await obey_farewell(order, spec, self._worker)

    async def _wait_turn(self) -> None:
        self._in_main(self.loaded.set_result, None)
        await self._turn

    # From the main thread

    def open(self) -> None:
        """Accept: all are up."""
        self._call(self._turn.set_result, None)

    def take(self, order: str) -> None:
        """Leave; a second order can only be to hurry."""
        self._call(self._take, order)

    def list_running(self, tell: Callable[[int, list[dict[str, Any]]], None]) -> None:
        """Have `tell` called, in the main thread, with the slot and what is at work there."""
        self._call(lambda: self._in_main(tell, self.slot, self._worker.list_running()))

    def reconfigure(self, values: dict[str, Any]) -> None:
        """Put changed settings into effect."""
        from leanserve.worker.reconfigure import reconfigure

        self._call(lambda: reconfigure(self._worker, values))

    def watch(self, slot: int, fds: list[int]) -> None:
        """Wait for the queues of a slot. The descriptors are ours to close."""
        self._call(self._wakeups.watch, slot, fds)

    def look(self, slot: int) -> None:
        """The worker of a slot has died."""
        self._call(self._wakeups.look, slot)

    def limit_idle(self, seconds: float) -> None:
        """In a drain, wait no longer than this for requests that may be on their way."""
        self._call(lambda: self._worker.limit_idle(seconds))

    def _take(self, order: str) -> None:
        if order == "hurry":
            self._worker.hurry()
        if not self._order.done():
            self._order.set_result(order)
        if not self._turn.done():
            self._turn.set_exception(BootFailed("another worker of the process could not start"))

    def _call(self, callback: Callable[..., object], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # its loop is closed: it has ended
            self._loop.call_soon_threadsafe(callback, *args)

    def _in_main(self, callback: Callable[..., object], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the process is about to end
            self._main.call_soon_threadsafe(callback, *args)

    def _tell_end(self, error: BaseException | None) -> None:
        for future in (self.loaded, self.ready):
            if not future.done():
                future.set_exception(error or RuntimeError(f"{self.name} ended before it was ready"))
                future.exception()  # nobody may be left who asks
        self.ended.set_result(error)


class _Crowd:
    """All loops, as those whom orders are for."""

    def __init__(self, channel: Channel) -> None:
        self.loops: list[_Loop] = []
        self._channel = channel
        self._set: dict[str, Any] | None = None

    def add(self, loop: _Loop) -> None:
        """Another one; it is told of what was put into effect while it began."""
        self.loops.append(loop)
        if self._set is not None:
            loop.reconfigure(self._set)

    def hurry(self) -> None:
        for loop in self.loops:
            loop.take("hurry")

    def limit_idle(self, seconds: float) -> None:
        for loop in self.loops:
            loop.limit_idle(seconds)

    def list_running(self, ticket: object) -> None:
        """One answer for each loop, so that one that is stuck holds up no other."""

        def tell(slot: int, running: list[dict[str, Any]]) -> None:
            tell_running(self._channel, ticket, running, slot)

        for loop in self.loops:
            loop.list_running(tell)

    def reconfigure(self, values: dict[str, Any]) -> None:
        self._set = {**(self._set or {}), **values}
        for loop in self.loops:
            loop.reconfigure(values)

    def watch(self, slot: int, fds: list[int]) -> None:
        for loop in self.loops:
            if loop.slot != slot:
                loop.watch(slot, [os.dup(fd) for fd in fds])
        for fd in fds:
            os.close(fd)

    def look(self, slot: int) -> None:
        for loop in self.loops:
            loop.look(slot)


async def serve(
    spec: WorkerSpec, app: Any, lanes: Sequence[Lane | None], recorders: Sequence[FlightRecorder | None]
) -> None:
    """Run one worker per lane until the supervisor says otherwise, or one of them has failed.

    They start one after the other: an application that loads its model when the first lifespan startup asks
    for it needs no lock for that. None accepts before all are up: a process whose last startup fails has
    taken nobody's request.

    Raises:
        BootFailed, OSError, SettingsError: as the start of a worker.
        BaseException: what has ended a thread.
    """
    crowd = _Crowd(spec.channel)
    loops, orders = crowd.loops, Orders(spec.channel, crowd, spec.slot, lanes[0])
    # After an error: whoever comes next holds the listeners, or the supervisor closes them.
    last = ["retire", "hurry"]
    try:
        for place, (lane, recorder) in enumerate(zip(lanes, recorders, strict=True)):
            loop = _Loop(spec, place, app, lane, recorder)
            loop.start()
            await loop.loaded
            crowd.add(loop)
        await orders.wait_turn()
        for loop in loops:
            loop.open()
        for loop in loops:
            await loop.ready
        spec.channel.send({"event": "ready", "seconds": time.monotonic() - spec.born_s})
        last = [await _wait_end(orders, loops)]
    finally:
        for loop in loops:
            for order in last:
                loop.take(order)
        errors = [await loop.ended for loop in loops]
    for error in errors:
        if error is not None:
            raise error


async def _wait_end(orders: Orders, loops: Sequence[_Loop]) -> str:
    """Wait until it is time to leave; the order for all loops."""
    stop = asyncio.ensure_future(orders.wait_stop())
    wanted: list[asyncio.Future[Any]] = [stop, *(loop.ended for loop in loops)]
    await asyncio.wait(wanted, return_when="FIRST_COMPLETED")
    if stop.done():
        return stop.result()
    stop.cancel()
    logger.error("a thread has ended: the process ends when the others have done what they have at work")
    return "retire"
