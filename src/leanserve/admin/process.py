"""The entry of the admin process: a worker of its own kind, beside those that serve the application."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import logging
import signal
from typing import Any

from leanserve.activation import forget_manager
from leanserve.admin.app import AdminApp
from leanserve.channel import AdminSpec, Channel
from leanserve.scoreboard import Scoreboard
from leanserve.settings import Settings
from leanserve.worker.process import die_with_parent, prepare_signals
from leanserve.worker.worker import Worker

__all__ = ["Orders", "main"]

logger = logging.getLogger("leanserve")

# The supervisor sleeps when it has nothing to do: it answers at once, or something is very wrong.
_ANSWER_S = 10.0
# A worker that has not said by then what it has at work is busy with it.
_LIST_S = 0.25


def main(spec: AdminSpec) -> int:
    """Serve until the supervisor ends this process, or itself."""
    prepare_signals()
    forget_manager()
    if not die_with_parent(spec.parent_pid, signal.SIGKILL):
        return 1
    # One that goes to the whole group (systemd does that) begins a drain, and a drain is to be seen.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with asyncio.Runner() as runner:  # asyncio's own loop: uvloop is for those who have much to do
        runner.run(_serve(spec))
    return 0


async def _serve(spec: AdminSpec) -> None:
    orders = Orders(spec.channel)
    app = AdminApp(spec.settings, Scoreboard(spec.scoreboard_fd), orders)
    settings = Settings.build(lifespan="off", access_log=False, proxy_headers=False)
    worker = Worker(app, settings, spec.listeners)
    await worker.start()
    await orders.wait_end()
    await worker.drain(keep_listeners=len(spec.listeners))


class Orders:
    """The admin process's end of the channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[tuple[bool, str]]] = {}
        self._asked: dict[int, asyncio.Future[list[dict[str, Any]]]] = {}
        self._lists: dict[int, asyncio.Queue[tuple[int, Any]]] = {}
        self._end = asyncio.Event()
        asyncio.get_running_loop().add_reader(channel.fileno(), self._read)

    async def wait_end(self) -> None:
        """Wait until the supervisor is gone (which ends this process anyway), or another one takes over."""
        await self._end.wait()

    async def give(self, order: str, number: int) -> tuple[bool, str]:
        """Hand an order to the supervisor: whether it was obeyed, and what it says to that."""
        ticket = next(self._numbers)
        self._waiting[ticket] = asyncio.get_running_loop().create_future()
        try:
            self._channel.send({"ask": order, "id": ticket, "number": number})
            async with asyncio.timeout(_ANSWER_S):
                return await self._waiting[ticket]
        except TimeoutError:
            return False, "the supervisor does not answer"
        finally:
            del self._waiting[ticket]

    async def list_running(self, number: int) -> dict[int, Any]:
        """What is at work, by worker, of those among `number` that answer: one that is stuck does not."""
        ticket = next(self._numbers)
        answers: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._lists[ticket] = answers
        found: dict[int, Any] = {}
        try:
            self._channel.send({"ask": "list", "id": ticket})
            async with asyncio.timeout(_LIST_S):
                for _ in range(number):
                    worker, running = await answers.get()
                    found.setdefault(worker, []).extend(running)
        except TimeoutError:
            pass  # these are all
        finally:
            del self._lists[ticket]
        return found

    async def list_queues(self) -> list[dict[str, Any]]:
        """What the kernel has queued, as :mod:`leanserve.supervisor.queues` says; [] without an answer."""
        ticket = next(self._numbers)
        self._asked[ticket] = asyncio.get_running_loop().create_future()
        try:
            self._channel.send({"ask": "queues", "id": ticket})
            async with asyncio.timeout(_LIST_S):
                return await self._asked[ticket]
        except TimeoutError:
            return []
        finally:
            del self._asked[ticket]

    def _read(self) -> None:
        try:
            for message in self._channel.receive():
                if "retire" in message:
                    self._end.set()
                elif "dead" in message:
                    _bury_gauges(int(message["dead"]))
                elif "running" in message:
                    if message["id"] in self._lists:
                        self._lists[message["id"]].put_nowait((message["worker"], message["running"] or []))
                elif "queues" in message:
                    if (asked := self._asked.get(message["id"])) is not None and not asked.done():
                        asked.set_result(message["queues"])
                elif (waiting := self._waiting.get(message["id"])) is not None and not waiting.done():
                    waiting.set_result((bool(message["ok"]), str(message["text"])))
        except EOFError:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._end.set()


def _bury_gauges(pid: int) -> None:
    """prometheus_client's multi-process mode keeps the gauges of a dead process until it is told."""
    try:
        multiprocess = importlib.import_module("prometheus_client.multiprocess")
    except ImportError:
        return  # the directory is set for something else
    try:
        multiprocess.mark_process_dead(pid)
    except (OSError, ValueError, TypeError) as error:
        logger.warning("prometheus_client did not take the death of pid %d: %s", pid, error)
