"""The lifespan protocol: the application's start and stop in this worker (ASGI lifespan spec 2.0)."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import re
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, ClassVar

from leanserve.asgi.interfaces import ASGI3App, Message
from leanserve.errors import AppProtocolError, BootFailed
from leanserve.machine import Machine
from leanserve.settings import LoadSettings

__all__ = ["Lifespan", "LifespanMove", "LifespanState"]

logger = logging.getLogger("leanserve")

#: How long a cancelled application task may take to end before it is left behind.
_CANCEL_GRACE_S = 1.0


class LifespanState(IntEnum):
    """Where the application's life stands."""

    STARTING = 0
    RUNNING = 1
    STOPPING = 2
    STOPPED = 3
    UNSUPPORTED = 4
    FAILED = 5


class LifespanMove(IntEnum):
    """What happens to it."""

    STARTUP_COMPLETE = 0
    STARTUP_FAILED = 1
    DECLINED = 2
    SHUTDOWN = 3
    SHUTDOWN_COMPLETE = 4
    SHUTDOWN_FAILED = 5
    APP_LEFT = 6
    ABANDONED = 7


class _LifespanMachine(Machine[LifespanState, LifespanMove]):
    START = LifespanState.STARTING
    TABLE: ClassVar = {
        (LifespanState.STARTING, LifespanMove.STARTUP_COMPLETE): LifespanState.RUNNING,
        (LifespanState.STARTING, LifespanMove.STARTUP_FAILED): LifespanState.FAILED,
        (LifespanState.STARTING, LifespanMove.DECLINED): LifespanState.UNSUPPORTED,
        (LifespanState.STARTING, LifespanMove.ABANDONED): LifespanState.FAILED,
        (LifespanState.RUNNING, LifespanMove.SHUTDOWN): LifespanState.STOPPING,
        (LifespanState.RUNNING, LifespanMove.APP_LEFT): LifespanState.STOPPED,
        (LifespanState.STOPPING, LifespanMove.SHUTDOWN_COMPLETE): LifespanState.STOPPED,
        (LifespanState.STOPPING, LifespanMove.SHUTDOWN_FAILED): LifespanState.FAILED,
        (LifespanState.STOPPING, LifespanMove.APP_LEFT): LifespanState.STOPPED,
        (LifespanState.STOPPING, LifespanMove.ABANDONED): LifespanState.FAILED,
    }


_MOVES = {
    "lifespan.startup.complete": LifespanMove.STARTUP_COMPLETE,
    "lifespan.startup.failed": LifespanMove.STARTUP_FAILED,
    "lifespan.shutdown.complete": LifespanMove.SHUTDOWN_COMPLETE,
    "lifespan.shutdown.failed": LifespanMove.SHUTDOWN_FAILED,
}


class Lifespan:
    """Runs the application's lifespan task; made once per worker.

    Args:
        app: the application.
        settings: the deadlines.
        extensions: ASGI extensions for its scope.

    Attributes:
        state: the namespace that the application fills in; each request gets a shallow copy.
        context: what the application has set in context variables by the end of its startup; each request
            runs in a copy.
        machine: where it stands.
    """

    def __init__(
        self, app: ASGI3App, settings: LoadSettings, extensions: Mapping[str, dict[str, Any]] | None = None
    ) -> None:
        self.state: dict[str, Any] = {}
        self.context = contextvars.copy_context()
        self.machine = _LifespanMachine()
        self._app = app
        self._settings = settings
        self._extensions = dict(extensions or {})
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._answered = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._message = ""

    def __repr__(self) -> str:
        return f"<Lifespan {self.machine.state.name}>"

    async def startup(self) -> None:
        """Start the application and wait until it says that it is ready.

        Raises:
            BootFailed: it said that it failed, took too long, or (``lifespan="on"``) does not know lifespan.
        """
        if self._settings.lifespan == "off":
            self.machine.advance(LifespanMove.DECLINED)
            return
        self._ask("lifespan.startup")
        self._task = asyncio.get_running_loop().create_task(self._run(), context=self.context)
        self._task.add_done_callback(self._app_left)
        limit = self._settings.lifespan_startup_timeout
        try:
            async with asyncio.timeout(limit):
                await self._answered.wait()
        except TimeoutError:
            raise BootFailed(
                f"lifespan startup took longer than {limit:g} s (--lifespan-startup-timeout)"
            ) from None
        finally:
            if self.machine.accepts(LifespanMove.ABANDONED):  # too late, or this worker is told to leave
                self.machine.advance(LifespanMove.ABANDONED)
                await self._end_task(0)
        if self.machine.state is LifespanState.FAILED:
            await self._end_task(self._settings.lifespan_shutdown_timeout)
            reason = _one_line(self._message)
            raise BootFailed(f"the application failed to start: {reason}") from self._failure()
        if self.machine.state is LifespanState.UNSUPPORTED:
            self._judge_unsupported()

    def _judge_unsupported(self) -> None:
        # "If an exception is raised when calling the application callable with a lifespan.startup message or
        # a scope of type lifespan, the server must continue but not send any lifespan events."
        error = self._failure()
        how = "returned" if error is None else " ".join(f"raised {type(error).__name__}: {error}".split())
        if self._settings.lifespan == "on":
            raise BootFailed(
                f"the application {how} before it answered lifespan.startup; --lifespan auto runs it without"
            ) from error
        if error is not None and self._inbox.empty():
            # It took the startup event and broke: more likely a fault than an application without lifespan.
            logger.warning(
                "the application %s during lifespan startup: it runs without lifespan; --lifespan on "
                "makes this an error", how, exc_info=error,
            )

    async def shutdown(self) -> None:
        """Let the application stop, if it is running; failures are logged. Safe to call twice."""
        if not self.machine.accepts(LifespanMove.SHUTDOWN):
            return
        self._answered.clear()
        self.machine.advance(LifespanMove.SHUTDOWN)
        self._ask("lifespan.shutdown")
        limit = self._settings.lifespan_shutdown_timeout
        try:
            async with asyncio.timeout(limit):
                await self._answered.wait()
        except TimeoutError:
            logger.error("lifespan shutdown took longer than %g s (--lifespan-shutdown-timeout)", limit)
        finally:
            if self.machine.accepts(LifespanMove.ABANDONED):
                self.machine.advance(LifespanMove.ABANDONED)
                await self._end_task(0)
        if self._message and self.machine.state is LifespanState.FAILED:
            logger.error("the application failed to stop: %s", self._message.rstrip())
        await self._end_task(limit)

    def _ask(self, event: str) -> None:
        self._inbox.put_nowait({"type": event})

    async def _run(self) -> None:
        scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": self.state,
            "extensions": self._extensions,
        }
        await self._app(scope, self._inbox.get, self._send)

    async def _send(self, message: Message) -> None:
        move = _MOVES.get(message["type"])
        if move is None or not self.machine.accepts(move):
            raise AppProtocolError(
                f"lifespan message {message['type']!r} while {self.machine.state.name.lower()}"
            )
        self._message = str(message.get("message", ""))
        self.machine.advance(move)
        self._answered.set()

    def _failure(self) -> BaseException | None:
        task = self._task
        return task.exception() if task is not None and task.done() and not task.cancelled() else None

    def _app_left(self, _task: asyncio.Task[None]) -> None:
        """The application's task is over, expectedly or not."""
        error = self._failure()
        if self.machine.accepts(LifespanMove.DECLINED):
            self.machine.advance(LifespanMove.DECLINED)
        elif self.machine.accepts(LifespanMove.APP_LEFT):
            early = self.machine.state is LifespanState.RUNNING
            self.machine.advance(LifespanMove.APP_LEFT)
            if early or error is not None:
                logger.error(
                    "the application left its lifespan %s", "early" if early else "with an error",
                    exc_info=error,
                )
        self._answered.set()

    async def _end_task(self, grace_s: float | None) -> None:
        """Wait for the application's task to end by itself, then cancel it."""
        if self._task is None:
            return
        if not self._task.done() and grace_s != 0:
            await asyncio.wait([self._task], timeout=grace_s)
        if not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_CANCEL_GRACE_S)


_FRAME = re.compile(r'^\s*File "(.+)", line (\d+)', re.MULTILINE)


def _one_line(message: str) -> str:
    """The point of a startup.failed message: frameworks put a whole traceback there."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return "it gave no reason"
    frames = _FRAME.findall(message)
    if not lines[0].startswith(("Traceback", "+ Exception Group Traceback")) or not frames:
        return " ".join(lines)
    return f"{lines[-1]} ({frames[-1][0]}, line {frames[-1][1]})"
