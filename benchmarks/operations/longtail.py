"""The long tail: one request in ten takes 50 ms; does another one wait behind it while a worker idles?

Arrivals are open-loop, at seeded exponential intervals, and a latency counts from the time at which the
request was meant to be sent, so that a server that is late does not slow its own load down.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from benchmarks.operations.client import Ended, Link, connect, first_in_line, get
from benchmarks.operations.results import Found, Scale, Tell
from benchmarks.operations.servers import SHARED, WORKERS, serving, wait_served, wait_settled
from benchmarks.peers import REFERENCE, Running

PART = "longtail"
SERVERS = (REFERENCE, SHARED, "uvicorn", "gunicorn", "granian")
AT_ONCE = "at once"

SLOW_SHARE, SLOW_MS = 0.1, 50
_CORES = 2  # what the CPU rows are reckoned with; the client has its part of them
_MOST_WAITING = 2000
_POOL = 16


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of load.

    Attributes:
        slow: path of the slow requests.
        share: rate as a share of what can be served.
        keep_alive: from a pool of connections; otherwise a connection per request.
    """

    slow: str
    share: float
    keep_alive: bool

    @property
    def rate(self) -> float:
        """Requests per second."""
        can_be_busy = min(_CORES, WORKERS) if self.slow == "burn" else WORKERS
        return self.share * can_be_busy / (SLOW_SHARE * SLOW_MS / 1000)


ROWS: dict[str, Row] = {
    f"{slow} {share:.0%} {'pool' if keep_alive else 'connection each'}": Row(slow, share, keep_alive)
    for slow, shares in (("block", (0.5, 0.7)), ("burn", (0.5, 0.7)), ("wait", (0.7,)))
    for share in shares
    for keep_alive in (False, True)
}
SLOW_TITLES = {
    "block": "sleep that holds the loop (a call to an accelerator)",
    "burn": "CPU time",
    "wait": "asyncio.sleep",
}


class _Pool:
    """Idle connections; one of them by lot, or a new one when all are busy."""

    def __init__(self, port: int, chance: random.Random) -> None:
        self._port, self._chance = port, chance
        self._idle: list[Link] = []

    async def fill(self) -> None:
        self._idle = list(await asyncio.gather(*(connect(self._port) for _ in range(_POOL))))

    async def take(self) -> Link:
        while self._idle:
            number = self._chance.randrange(len(self._idle))
            self._idle[number], self._idle[-1] = self._idle[-1], self._idle[number]
            link = self._idle.pop()
            if not link.ended.is_set():
                return link
        return await connect(self._port)

    def give(self, link: Link) -> None:
        self._idle.append(link)

    def close(self) -> None:
        for link in self._idle:
            link.close()


class _Load:
    """One row: what was meant to be sent when, and how long it took from then."""

    def __init__(self, port: int, row: Row, seed: int) -> None:
        self._port, self._row = port, row
        self._chance = random.Random(seed)
        self._pool = _Pool(port, random.Random(seed + 1))
        self._waiting: set[asyncio.Task[None]] = set()
        self.latencies: dict[bool, list[float]] = {False: [], True: []}  # by: was it a slow one?
        self.failed = 0

    def _plan(self, seconds: float) -> Iterator[tuple[float, bool]]:
        when = 0.0
        while (when := when + self._chance.expovariate(self._row.rate)) < seconds:
            yield when, self._chance.random() < SLOW_SHARE

    async def run(self, seconds: float) -> None:
        if self._row.keep_alive:
            await self._pool.fill()
        begun = time.perf_counter() + 0.01
        for when, slow in self._plan(seconds):
            wait_s = begun + when - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            if len(self._waiting) >= _MOST_WAITING:
                self.failed += 1
                continue
            task = asyncio.create_task(self._one(begun + when, slow))
            self._waiting.add(task)
            task.add_done_callback(self._waiting.discard)
        await asyncio.gather(*self._waiting)
        self._pool.close()

    async def _one(self, meant_s: float, slow: bool) -> None:
        target = f"/{self._row.slow}?ms={SLOW_MS}" if slow else "/pid"
        try:
            link = await (self._pool.take() if self._row.keep_alive else connect(self._port))
            try:
                answer = await link.ask(get(target, close=not self._row.keep_alive))
            except BaseException:
                link.close()
                raise
        except (OSError, Ended, TimeoutError):
            self.failed += 1
            return
        self.latencies[slow].append(time.perf_counter() - meant_s)
        self.failed += answer.status != 200
        if self._row.keep_alive and not answer.last:
            self._pool.give(link)
        else:
            link.close()


def quantile(values: list[float], share: float) -> float:
    """The smallest value that `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


async def _measure(port: int, row: Row, seed: int, seconds: float) -> dict[str, float]:
    load = _Load(port, row, seed)
    with first_in_line():
        await load.run(seconds)
    fast, slow = load.latencies[False], load.latencies[True]
    every = [*fast, *slow]
    if not (fast and slow):
        raise RuntimeError(f"{len(every)} answers, {load.failed} failures")
    return {
        "p50": quantile(every, 0.5), "p90": quantile(every, 0.9), "p99": quantile(every, 0.99),
        "max": max(every), "fast_p99": quantile(fast, 0.99), "failed": load.failed, "answered": len(every),
    }


async def _round(name: str, number: int, scale: Scale, tell: Tell) -> None:
    """One server through all rows; the same arrivals for all servers of a round."""
    try:
        with serving(name) as server:
            await wait_served(server)
            await wait_settled(server.port, WORKERS)
            for at, (key, row) in enumerate(ROWS.items()):
                figures = await _measure(server.port, row, 1000 * number + at, scale.tail_seconds)
                tell(Found(PART, key, name, number, figures))
    except (RuntimeError, OSError) as error:
        tell(Found(PART, next(iter(ROWS)), name, number, reason=str(error)))


@dataclass(frozen=True, slots=True)
class AtOnce:
    """Requests that hold their worker, all sent at the same time."""

    requests: int = 8
    workers: int = 2
    ms: int = 500


async def _trial(port: int, what: AtOnce) -> tuple[Counter[int], float]:
    async def one() -> int:
        link = await connect(port)
        try:
            return (await link.ask(get(f"/block?ms={what.ms}", close=True))).pid
        finally:
            link.close()

    begun = time.perf_counter()
    found = await asyncio.gather(*(one() for _ in range(what.requests)))
    return Counter(found), time.perf_counter() - begun


async def _at_once(servers: list[str], trials: int, tell: Tell, what: AtOnce) -> None:
    """All servers stand side by side: while one is asked the others' workers sleep, and the trials overlap.

    They begin 0.1 s after each other: connections are handed out within some milliseconds.
    """
    with contextlib.ExitStack() as stack:
        running: dict[str, Running] = {}
        for name in servers:
            running[name] = stack.enter_context(serving(name, workers=what.workers))
            await wait_served(running[name])
            await wait_settled(running[name].port, what.workers)
        most: dict[str, list[float]] = {name: [] for name in servers}
        walls: dict[str, list[float]] = {name: [] for name in servers}
        failed: Counter[str] = Counter()

        async def trial(name: str, after_s: float) -> None:
            await asyncio.sleep(after_s)
            try:
                split, wall_s = await _trial(running[name].port, what)
            except (OSError, Ended, TimeoutError):
                failed[name] += 1
                return
            most[name].append(max(split.values()))
            walls[name].append(wall_s)

        for _ in range(trials):
            await asyncio.gather(*(trial(name, 0.1 * at) for at, name in enumerate(servers)))
    for name in servers:
        if most[name]:
            even = what.requests / what.workers
            tell(Found(PART, AT_ONCE, name, figures={
                "even": sum(one == even for one in most[name]), "trials": len(most[name]),
                "most": max(most[name]), "wall": median(walls[name]),
                "wall_most": max(walls[name]), "failed": failed[name],
            }, series={"most": most[name], "wall": walls[name]}))
        else:
            tell(Found(PART, AT_ONCE, name, reason=f"{failed[name]} trials failed"))


async def run(servers: list[str], scale: Scale, tell: Tell) -> None:
    """Rounds in alternating order; then the long requests at once."""
    for number in range(1, scale.rounds + 1):
        for name in servers if number % 2 else reversed(servers):
            await _round(name, number, scale, tell)
    await _at_once(servers, scale.trials, tell, AtOnce())
