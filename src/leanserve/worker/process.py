"""The entry of a supervised worker process."""

from __future__ import annotations

import asyncio
import faulthandler
import importlib.util
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from leanserve.activation import forget_manager
from leanserve.asgi.interfaces import load_app
from leanserve.channel import DUMP_SIGNAL, Channel, WorkerSpec
from leanserve.errors import BootFailed, SettingsError
from leanserve.flight import FlightRecorder
from leanserve.listeners import Listener
from leanserve.scoreboard import Lane, Scoreboard
from leanserve.starting import tell_with
from leanserve.worker.wakeups import Wakeups
from leanserve.worker.worker import Worker
from leanserve.workerenv import environment_of

__all__ = [
    "Orders",
    "describe_failure",
    "die_with_parent",
    "loop_factory",
    "main",
    "main_of_spawned",
    "obey_farewell",
    "prepare_signals",
    "tell_closed",
    "tell_full",
]

logger = logging.getLogger("leanserve")

# Without the supervisor there is nobody to drain for: what can be finished in this time is.
_ORPHAN_HURRY_S = 0.5
# A request that comes at the end of it would be cut, so the last ones may come before that.
_ORPHAN_IDLE_S = 0.2
_ORPHAN_EXIT_S = 1.8

# A SIGTERM may be meant for this worker alone, or have gone to the whole group (systemd does that); in the
# second case the supervisor's order follows, and is the better one.
_ORDER_FOLLOWS_S = 0.2

# The channel takes a message whole or not at all.
_ERROR_CHARS, _TRACE_CHARS = 2_000, 20_000

# Not sys.stderr, which the application may replace with something that has no descriptor.
_STDERR_FD = 2

_EXIT_SETTINGS, _EXIT_BOOT, _EXIT_BUG = 2, 3, 1


def main(spec: WorkerSpec) -> int:
    """Import the application, serve it until told to stop, and return the exit code of the process."""
    prepare_signals()
    forget_manager()
    if not die_with_parent(spec.parent_pid):
        return _EXIT_BUG
    _answer_dump_signal()
    os.environ.update(environment_of(spec.settings.pool.worker_env, spec.slot))
    lanes: list[Lane | None] = [None] * spec.loops
    recorders: list[FlightRecorder | None] = [None] * spec.loops
    if spec.scoreboard_fd >= 0:
        board = Scoreboard(spec.scoreboard_fd)
        for place in range(spec.loops):
            lanes[place] = lane = board.lane(spec.slot + place, spec.lane)
            lane.begin(os.getpid(), spec.generation)  # behind the signal: who is on the board can be asked
            if spec.settings.worker.flight_recorder:
                recorders[place] = FlightRecorder(spec.scoreboard_fd, spec.slot + place, spec.lane)
    try:
        tell_with(lambda seconds: spec.channel.send({"event": "extend", "seconds": seconds}))
        app = spec.loaded if spec.loaded is not None else load_app(spec.app, spec.settings.load)
        with asyncio.Runner(loop_factory=loop_factory(spec.settings.worker.loop)) as runner:
            if spec.loops > 1:
                from leanserve.worker.threads import serve

                runner.run(serve(spec, app, lanes, recorders))
            else:
                runner.run(_serve(spec, app, lanes[0], recorders[0]))
    except (BootFailed, SettingsError, OSError) as error:
        _tell_failure(spec, str(error), traceback.format_exc())
        return _EXIT_SETTINGS if isinstance(error, SettingsError) else _EXIT_BOOT
    except Exception as error:  # noqa: BLE001 - one of the three named places: the worker's main
        _tell_failure(spec, f"internal error: {_first_of(error)!r}", traceback.format_exc())
        return _EXIT_BUG
    return 0


def _first_of(error: BaseException) -> BaseException:
    """What went wrong first, where tidying up failed for the same reason."""
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    return error


def main_of_spawned(fd: int) -> int:
    """As :func:`main`, for a process that was started with ``start_method="spawn"``.

    Args:
        fd: a file with the pickled facts; sockets and pages come as inherited descriptors.
    """
    import pickle

    with os.fdopen(fd, "rb") as file:
        facts: dict[str, Any] = pickle.load(file)
    channel = Channel(socket.socket(fileno=facts.pop("channel")))
    channel.sock.setblocking(False)
    slots: list[list[socket.socket]] = [
        [Listener(fileno=number) for number in slot] for slot in facts.pop("listeners")
    ]
    for sock in (sock for slot in slots for sock in slot):
        sock.setblocking(False)
    spec = WorkerSpec(channel=channel, listeners=slots, **facts)
    from leanserve import logs

    logs.configure(spec.settings.log)
    return main(spec)


def prepare_signals() -> None:
    """^C and ^\\ at a terminal go to the whole group: the supervisor alone decides what they mean.

    SIGTERM keeps its default until the application is up: who imports or loads a model ends at once.
    """
    for name in ("SIGINT", "SIGQUIT", "SIGHUP", "SIGTTIN", "SIGTTOU", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _answer_dump_signal() -> None:
    """Write the stacks of all threads to stderr when the supervisor asks, and when C code fails (SIGSEGV,
    SIGABRT and their like); the GIL is not needed for that."""
    if sys.stderr is None:
        return
    faulthandler.enable(file=_STDERR_FD, all_threads=True)
    if DUMP_SIGNAL:
        faulthandler.register(DUMP_SIGNAL, file=_STDERR_FD, all_threads=True, chain=False)


def die_with_parent(parent_pid: int, number: int = signal.SIGTERM) -> bool:
    """Have the kernel send a signal when the supervisor dies; False when it is dead already."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
    return parent_pid in (0, os.getppid())


def loop_factory(loop: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the event loop; None for the one of asyncio."""
    if loop == "uvloop" or (loop == "auto" and importlib.util.find_spec("uvloop") is not None):
        import uvloop

        return uvloop.new_event_loop
    return None


def _tell_failure(spec: WorkerSpec, error: str, trace: str) -> None:
    message = describe_failure(error, trace)
    if not spec.channel.send(message):
        logger.error("%s", message["error"])


def describe_failure(error: str, trace: str) -> dict[str, str]:
    """The event that tells the supervisor of a boot that has failed."""
    error = error if len(error) <= _ERROR_CHARS else error[:_ERROR_CHARS] + "..."
    return {"event": "failed", "error": error, "trace": trace[-_TRACE_CHARS:]}


def tell_full(channel: Channel) -> None:
    """``limit_max_requests`` is reached."""
    channel.send({"event": "full"})


def tell_wants(channel: Channel) -> None:
    """The application has said whether it wants requests."""
    channel.send({"event": "wants"})


def tell_closed(channel: Channel) -> None:
    """New connections come here no more."""
    channel.send({"event": "closed"})


async def obey_farewell(order: str, spec: WorkerSpec, worker: Worker) -> None:
    """Drain the worker as the order to leave says: with it go its listeners, or its place alone."""
    kept = {"leave": spec.shared, "retire": len(worker.listeners)}
    await worker.drain(keep_listeners=kept.get(order, 0), all_leave=order not in kept)


def tell_running(channel: Channel, ticket: object, running: list[dict[str, Any]], slot: int) -> None:
    """Answer what is at work in a slot."""
    channel.send({"event": "running", "list": ticket, "running": running, "slot": slot})


async def _serve(
    spec: WorkerSpec, app: Any, lane: Lane | None, recorder: FlightRecorder | None
) -> None:
    channel = spec.channel
    wakeups = Wakeups()
    worker = Worker(
        app,
        spec.settings,
        spec.listeners[spec.slot],
        on_full=lambda: tell_full(channel),
        on_wants=lambda: tell_wants(channel),
        on_closed=lambda: tell_closed(channel),
        lane=lane,
        recorder=recorder,
        token_fds=spec.tokens,
        wakeups=wakeups,
        shared=spec.shared,
    )
    orders = Orders(channel, _Single(worker, wakeups, spec), spec.slot, lane)
    await worker.start(orders.wait_turn)
    channel.send({"event": "ready", "seconds": time.monotonic() - spec.born_s})
    order = await orders.wait_stop()
    await obey_farewell(order, spec, worker)


class Ordered(Protocol):
    """Whom the supervisor's words are for: the worker of this process, or several."""

    def hurry(self) -> None:
        """Wait for nothing any more."""

    def limit_idle(self, seconds: float) -> None:
        """In a drain, wait no longer than this for requests that may be on their way."""

    def list_running(self, ticket: object) -> None:
        """Tell what is at work."""

    def reconfigure(self, values: dict[str, Any]) -> None:
        """Put changed settings into effect."""

    def watch(self, slot: int, fds: list[int]) -> None:
        """Wait for the queues of a slot, from the end of the row. The descriptors are ours to close."""

    def look(self, slot: int) -> None:
        """The worker of a slot has died."""


class _Single:
    """The only worker of its process."""

    def __init__(self, worker: Worker, wakeups: Wakeups, spec: WorkerSpec) -> None:
        self._worker = worker
        self._spec = spec
        self.hurry = worker.hurry
        self.limit_idle = worker.limit_idle
        self.watch = wakeups.watch
        self.look = wakeups.look

    def list_running(self, ticket: object) -> None:
        tell_running(self._spec.channel, ticket, self._worker.list_running(), self._spec.slot)

    def reconfigure(self, values: dict[str, Any]) -> None:
        from leanserve.worker.reconfigure import reconfigure

        reconfigure(self._worker, values)


class Orders:
    """What the supervisor says, and that it is gone."""

    def __init__(self, channel: Channel, target: Ordered, slot: int, lane: Lane | None) -> None:
        self._channel = channel
        self._target = target
        self._slot = slot
        self._lane = lane
        self._loop = asyncio.get_running_loop()
        self._turn: asyncio.Future[None] = self._loop.create_future()
        self._stop: asyncio.Future[str] = self._loop.create_future()
        self._loop.add_reader(channel.fileno(), self._read)
        threading.Thread(target=_end_with_parent, args=(channel.fileno(),), daemon=True).start()

    async def wait_turn(self) -> None:
        """Say that the application is up; wait for all slots to listen, in the order that steering counts
        on. Until then SIGTERM has its default effect, which would reset the first connections."""
        self._channel.send({"event": "loaded"})
        await self._turn
        # Somebody meant this worker alone: its listeners stay for its successor.
        self._loop.add_signal_handler(
            signal.SIGTERM, self._loop.call_later, _ORDER_FOLLOWS_S, self._take, "retire"
        )

    async def wait_stop(self) -> str:
        """Wait for the order to leave."""
        return await self._stop

    def _read(self) -> None:
        try:
            for message in self._channel.receive():
                if "set" in message:
                    self._target.reconfigure(message["set"])
                elif "list" in message:
                    self._target.list_running(message["list"])
                elif "watch" in message:
                    self._target.watch(int(message["watch"]), message["fds"])
                elif "look" in message:
                    self._target.look(int(message["look"]))
                else:
                    self._take(str(message.get("order")))
        except EOFError:
            self._loop.remove_reader(self._channel.fileno())
            self._target.limit_idle(_ORPHAN_IDLE_S)
            self._take(_order_of_orphan(self._slot, self._lane))
            self._loop.call_later(_ORPHAN_HURRY_S, self._target.hurry)

    def _take(self, order: str) -> None:
        if order == "open":
            if not self._turn.done():
                self._turn.set_result(None)
            return
        if order == "hurry":
            self._target.hurry()
        if not self._stop.done():
            self._stop.set_result(order)


def _order_of_orphan(slot: int, lane: Lane | None) -> str:
    """What a worker does whose supervisor is gone: in the middle of an upgrade another one, which lives,
    holds the same listeners, and they must not stop to listen."""
    partner, slots = (0, 0) if lane is None else lane.partner
    if not partner:
        return "drain"
    try:
        os.kill(partner, 0)
    except OSError:
        return "drain"
    return "retire" if slot < slots else "leave"


def _end_with_parent(channel: int) -> None:
    """In a thread: the event loop may be stuck in the application when the supervisor dies."""
    poller = select.poll()
    poller.register(channel, 0)  # for POLLHUP alone
    poller.poll()
    time.sleep(_ORPHAN_EXIT_S)
    os._exit(_EXIT_BUG)
