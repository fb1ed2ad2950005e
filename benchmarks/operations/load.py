"""The load of the chaos: POSTs that are answered with their own body, and what became of each.

Some connections are kept alive, some are used once. A request that fails is judged when all is over: by the
journal (who began it, and how often), by the list of the killed, and by whose the connection was.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from benchmarks.operations.client import Answer, Ended, Link, connect, post
from benchmarks.operations.journal import MOST_REQUESTS, Journal
from benchmarks.operations.owners import Address

_WORK_MS = 5
_AFTER_FAILURE_S = 0.02


class Loss(StrEnum):
    """What can become of a request, besides its answer."""

    BEGUN_BY_KILLED = "begun by a killed worker"
    ACCEPTED_BY_KILLED = "accepted by a killed worker, not begun"
    KEPT_BY_KILLED = "sent to a killed worker on a kept connection, not begun"
    REFUSED = "refused"
    NEVER_BEGUN = "reset or closed, new connection, never begun"
    REUSE_RACE = "reset or closed, kept connection that was idle, never begun"
    CUT = "reset or closed, begun by a worker that was not killed"
    SERVER_ERROR = "status 500 and above"
    WRONG = "wrong answer"
    LATE_BEGUN = "no answer in time, begun"
    LATE_NEVER_BEGUN = "no answer in time, never begun"


#: Nothing can save these from a SIGKILL.
OF_THE_KILLED = frozenset({Loss.BEGUN_BY_KILLED, Loss.ACCEPTED_BY_KILLED, Loss.KEPT_BY_KILLED})


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that was not answered as it should be.

    Attributes:
        number: of the request.
        what: REFUSED, SERVER_ERROR, WRONG, or one that judge() makes more of: NEVER_BEGUN, LATE_NEVER_BEGUN.
        address: the client's.
        before: the worker that has answered on this connection; 0 on a new one.
        begun_s: time.monotonic() before it was sent, and before the connect where there was one.
        when_s: the same, of its end.
        told: for people.
    """

    number: int
    what: Loss
    address: Address
    before: int
    begun_s: float
    when_s: float
    told: str


@dataclass
class Killed:
    """Who was killed: pid to time.monotonic(), and the clients whose connections it had accepted."""

    pids: dict[int, float] = field(default_factory=dict)
    clients: dict[Address, float] = field(default_factory=dict)

    def note(self, pid: int, clients: set[Address]) -> None:
        """`pid` is about to be killed, and these connections with it."""
        now_s = time.monotonic()
        self.pids.setdefault(pid, now_s)
        self.clients.update(dict.fromkeys(clients, now_s))

    def judge(self, failure: Failure, journal: Journal) -> Loss:
        """Whose fault it was."""
        if failure.what not in (Loss.NEVER_BEGUN, Loss.LATE_NEVER_BEGUN):
            return failure.what
        pid = journal.begun(failure.number)[0]
        if self.pids.get(pid, math.inf) <= failure.when_s:
            return Loss.BEGUN_BY_KILLED
        if failure.what is Loss.LATE_NEVER_BEGUN:
            return Loss.LATE_BEGUN if pid else failure.what
        if pid:
            return Loss.CUT
        if failure.before:
            killed = self.pids.get(failure.before, math.inf) <= failure.when_s
            return Loss.KEPT_BY_KILLED if killed else Loss.REUSE_RACE
        killed = failure.begun_s <= self.clients.get(failure.address, math.inf) <= failure.when_s
        return Loss.ACCEPTED_BY_KILLED if killed else Loss.NEVER_BEGUN


@dataclass(frozen=True, slots=True)
class Lane:
    """Requests one after the other.

    Attributes:
        pause: (shortest, longest) seconds between an answer and the next request.
    """

    keep_alive: bool
    pause: tuple[float, float]


#: Busy ones of both kinds, and some connections that idle for longer than a drain waits for them.
LANES = (
    *(Lane(keep_alive=True, pause=(0.0, 0.03)) for _ in range(12)),
    *(Lane(keep_alive=False, pause=(0.0, 0.03)) for _ in range(12)),
    *(Lane(keep_alive=True, pause=(0.3, 2.5)) for _ in range(8)),
)


class Load:
    """Runs all lanes until it is stopped.

    Attributes:
        answered: request number to worker.
        latencies: of the answered, in seconds, with the connect where there was one.
        longest_silence_s: between two answers on new connections, whoever got them.
        workers: who has answered, and when last.
        idle_closed: kept connections that ended while nothing was asked on them; the client opens another.
        failures: as the clients saw them.
    """

    def __init__(self, port: int) -> None:
        self.answered: dict[int, int] = {}
        self.latencies: list[float] = []
        self.longest_silence_s = 0.0
        self.workers: dict[int, float] = {}
        self.idle_closed = 0
        self.failures: list[Failure] = []
        self._port = port
        self._numbers = itertools.count()
        self._last_s = 0.0
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Until stop(), and until what is under way then has ended."""
        self._last_s = time.monotonic()
        await asyncio.gather(*(self._run(lane, random.Random(seed)) for seed, lane in enumerate(LANES)))

    def stop(self) -> None:
        """No further requests."""
        self._stop.set()

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            pass  # the usual end

    async def _run(self, lane: Lane, chance: random.Random) -> None:
        link: Link | None = None
        before = 0
        while not self._stop.is_set() and (number := next(self._numbers)) < MOST_REQUESTS:
            if link is not None and link.ended.is_set():
                self.idle_closed += 1
                link = None
            begun_s = time.monotonic()
            if link is None:
                before = 0
                link = await self._connect(number, begun_s)
                if link is None:
                    await self._pause(_AFTER_FAILURE_S)
                    continue
            answer = await self._ask(link, number, before, begun_s, keep_alive=lane.keep_alive)
            if answer is not None:
                self._count(number, answer.pid, begun_s, fresh=not before)
            if answer is None or answer.last or not lane.keep_alive:
                link.close()
                link = None
            else:
                before = answer.pid
            await self._pause(chance.uniform(*lane.pause) if answer else _AFTER_FAILURE_S)
        if link is not None:
            link.close()

    def _count(self, number: int, pid: int, begun_s: float, *, fresh: bool) -> None:
        now_s = time.monotonic()
        self.answered[number] = pid
        self.workers[pid] = now_s
        self.latencies.append(now_s - begun_s)
        if fresh:
            self.longest_silence_s = max(self.longest_silence_s, now_s - self._last_s)
            self._last_s = now_s

    async def _connect(self, number: int, begun_s: float) -> Link | None:
        address = (f"127.0.0.{1 + number % 50}", 0)
        try:
            return await connect(self._port, address)
        except ConnectionRefusedError as error:
            what, told = Loss.REFUSED, repr(error)
        except TimeoutError as error:
            what, told = Loss.LATE_NEVER_BEGUN, repr(error)
        except OSError as error:
            what, told = Loss.NEVER_BEGUN, repr(error)
        self.failures.append(Failure(number, what, address, 0, begun_s, time.monotonic(), told))
        return None

    async def _ask(
        self, link: Link, number: int, before: int, begun_s: float, *, keep_alive: bool
    ) -> Answer | None:
        body = b"request %d" % number
        request = post(f"/work?id={number}&ms={_WORK_MS}", body, close=not keep_alive)
        try:
            answer = await link.ask(request)
        except Ended as error:
            what, told = Loss.NEVER_BEGUN, repr(error)
        except TimeoutError as error:
            what, told = Loss.LATE_NEVER_BEGUN, repr(error)
        else:
            if answer.status == 200 and answer.body == body:
                return answer
            what = Loss.SERVER_ERROR if answer.status >= 500 else Loss.WRONG
            told = f"{answer.status} {answer.body[:80]!r}"
        now_s = time.monotonic()
        self.failures.append(Failure(number, what, link.address, before, begun_s, now_s, told))
        return None


def losses(load: Load, killed: Killed, journal: Journal) -> Counter[Loss]:
    """All failures, judged."""
    return Counter(killed.judge(failure, journal) for failure in load.failures)


def begun_twice(load: Load, journal: Journal) -> int:
    """Answered requests that the application began more than once: somebody has sent them again."""
    return sum(journal.begun(number)[1] > 1 for number in load.answered)
