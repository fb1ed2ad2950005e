"""Tells, while it lasts, that something blocks the event loop: where it stands, and for whose request.

The loop notes the time now and then (a beat). A thread that is not blocked reads that note, and a beat that
is overdue is a stall: one line while it lasts, one when it is over. Nothing is done about it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Collection
from types import CodeType, FrameType
from typing import Final

from leanserve.asgi.messages import Running

__all__ = ["Watchdog"]

logger = logging.getLogger("leanserve")

# Beats and looks per limit, and the longest time between two of them: four a second for the default limit.
_PER_LIMIT: Final = 4
_LONGEST_PERIOD_S: Final = 1.0

_STANDARD = os.path.dirname(os.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")


class Watchdog:
    """Watches one event loop.

    Args:
        limit_s: a stall is what takes longer.
        running: the exchanges at work, to find the one whose task runs; looked at from the thread.
    """

    def __init__(self, limit_s: float, running: Collection[Running]) -> None:
        self._limit_s = limit_s
        self._period_s = min(limit_s / _PER_LIMIT, _LONGEST_PERIOD_S)
        self._running = running
        self._stopped = threading.Event()
        self._beaten_s = self._looked_s = self._cpu_s = 0.0
        #: What is over and not told yet.
        self._over_s = 0.0
        self._told = False
        #: The code that stands below every callback: the loop, and what runs it.
        self._below: frozenset[CodeType] = frozenset()

    loop: asyncio.AbstractEventLoop
    _thread_id: int
    _timer: asyncio.TimerHandle

    def start(self) -> None:
        """Begin; called in the loop that is to be watched."""
        self.loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self._beaten_s = self._looked_s = time.monotonic()
        self._cpu_s = time.process_time()
        self._timer = self.loop.call_later(0, self._beat)
        threading.Thread(target=self._watch, name="leanserve-watchdog", daemon=True).start()

    def stop(self) -> None:
        """End; the thread goes by itself. Nothing when it was not started."""
        self._stopped.set()
        if hasattr(self, "_timer"):
            self._timer.cancel()

    # In the loop

    def _beat(self) -> None:
        if not self._below:
            self._below = frozenset(frame.f_code for frame, _ in traceback.walk_stack(sys._getframe(1)))
        self.beat(time.monotonic())
        self._timer = self.loop.call_later(self._period_s, self._beat)

    def beat(self, now: float) -> None:
        """The loop runs."""
        late_s = now - self._beaten_s - self._period_s
        if late_s > self._limit_s:
            self._over_s = late_s
        self._beaten_s = now

    # In the thread

    def _watch(self) -> None:
        while not self._stopped.wait(self._period_s):
            self.look(time.monotonic())

    def look(self, now: float) -> None:
        """Tell of a stall that lasts, and of one that is over; each once."""
        overslept = now - self._looked_s > self._period_s + self._limit_s / 2
        had_cpu_s, self._cpu_s = self._cpu_s, time.process_time()
        self._looked_s = now
        if self._over_s:
            over_s, self._over_s = self._over_s, 0.0
            seen, self._told = self._told, False
            logger.warning(
                "the event loop was stalled for %.1f s%s",
                over_s, " and goes on" if seen else f", unseen{self._why_late(had_cpu_s)}",
            )  # fmt: skip
        late_s = now - self._beaten_s - self._period_s
        if late_s > self._limit_s and not self._told:
            self._told = True
            late = self._why_late(had_cpu_s) if overslept else ""
            frame = sys._current_frames().get(self._thread_id)
            logger.warning(
                "the event loop is stalled, %.1f s so far, by %s: %s%s",
                late_s, self._who(), "no Python code" if frame is None else _where(frame, self._below), late,
            )  # fmt: skip
            if frame is not None and logger.isEnabledFor(logging.DEBUG):
                logger.debug("the stack of the stall:\n%s", "".join(traceback.format_stack(frame)))

    def _why_late(self, had_cpu_s: float) -> str:
        # The thread that looks could not run either. With processor time, that is one C call.
        used_s = self._cpu_s - had_cpu_s
        return (
            f" (no thread could run: one C call, or no processor time; the process had {used_s:.1f} s of it)"
        )

    def _who(self) -> str:
        """The request whose task runs; else the task, whose coroutine tells more than its name."""
        task = asyncio.current_task(self.loop)
        if task is None:
            return "a callback"
        for exchange in list(self._running):
            if getattr(exchange, "task", None) is task:
                return exchange._name()
        coroutine = task.get_coro()
        return f"the task {getattr(coroutine, '__qualname__', type(coroutine).__name__)}"


def _where(frame: FrameType, below: frozenset[CodeType]) -> str:
    """The innermost frame of the application, and what it has called, if that is Python."""
    own = _find_own(frame, below)
    return _place(own) if own is frame else f"{_place(own)}, within it {_place(frame)}"


def _find_own(innermost: FrameType, below: frozenset[CodeType]) -> FrameType:
    """The innermost frame that is of no library, else of no standard one and not ours, else the innermost."""
    installed: FrameType | None = None
    frame: FrameType | None = innermost
    while frame is not None and frame.f_code not in below:
        file = frame.f_code.co_filename
        if any(part in file for part in _INSTALLED):
            installed = installed or (None if file.startswith(_OURS) else frame)
        elif not file.startswith((_STANDARD, _OURS, "<frozen")):
            return frame
        frame = frame.f_back
    return installed or innermost


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
