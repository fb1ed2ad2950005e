"""Spread: which worker gets a connection, by the answers to a GET on each of many."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.operations.client import Ended, Link, connect, get
from benchmarks.operations.results import Found, Scale, Tell
from benchmarks.operations.servers import SHARED, WORKERS, serving, wait_served, wait_settled
from benchmarks.peers import REFERENCE

PART = "spread"
SERVERS = (REFERENCE, SHARED, "uvicorn", "gunicorn", "granian")
SOURCE_PORTS = 200
_FIRST_PORT = 20_000  # below those that the kernel gives to others
_LAST_PORT = 30_000


@dataclass(frozen=True, slots=True)
class Case:
    """How the connections come.

    Attributes:
        at_once: how many are asked at a time.
        held: all stay open until the last one is answered.
    """

    title: str
    at_once: int
    held: bool = False


CASES = {
    "one by one": Case("one after the other", 1),
    "64 at a time": Case("64 at a time", 64),
    "held": Case("64 at a time, all of them kept open", 64, held=True),
}


def sources(network: int) -> Iterator[tuple[str, int]]:
    """SOURCE_PORTS ports of 127.`network`.0.1, then of the next address; no pair comes twice.

    More ports than that stand ready, for those that somebody else has.
    """
    for number in itertools.count():
        address = f"127.{network}.{number // 250}.{number % 250 + 1}"
        yield from ((address, port) for port in range(_FIRST_PORT, _FIRST_PORT + SOURCE_PORTS))


async def _connect(port: int, source: tuple[str, int]) -> Link:
    """From this source, or from one of the same address that nobody has."""
    address, wanted = source
    for candidate in range(wanted, _LAST_PORT, SOURCE_PORTS):
        try:
            return await connect(port, (address, candidate))
        except OSError as error:
            if error.errno not in (98, 99):  # EADDRINUSE, EADDRNOTAVAIL
                raise
    raise OSError(f"no port of {address} is free")


async def _ask_all(port: int, case: Case, connections: int, network: int) -> tuple[Counter[int], int]:
    """(answers by process, connections without one)"""
    counts: Counter[int] = Counter()
    failed = 0
    kept: list[Link] = []
    queue = itertools.islice(sources(network), connections)
    request = get("/pid", close=not case.held)

    async def some() -> None:
        nonlocal failed
        for source in queue:
            try:
                link = await _connect(port, source)
                try:
                    counts[int((await link.ask(request)).body)] += 1
                finally:
                    if case.held:
                        kept.append(link)
                    else:
                        link.close()
            except (OSError, Ended, TimeoutError):
                failed += 1

    try:
        await asyncio.gather(*(some() for _ in range(case.at_once)))
        failed += sum(link.ended.is_set() for link in kept)
    finally:
        for link in kept:
            link.close()
    return counts, failed


async def _one(name: str, scale: Scale, tell: Tell) -> None:
    for network, (key, case) in enumerate(CASES.items(), 1):
        # A server anew each time: what one case leaves behind is no part of the next.
        with serving(name) as server:
            await wait_served(server)
            await wait_settled(server.port, WORKERS)
            counts, failed = await _ask_all(server.port, case, scale.connections, network)
        shares = [*counts.values(), *[0] * (WORKERS - len(counts))]
        tell(Found(PART, key, name, figures={
            "ratio": max(shares) / max(min(shares), 1), "busiest": max(shares), "idlest": min(shares),
            "answered": counts.total(), "failed": failed,
        }))


async def run(servers: list[str], scale: Scale, tell: Tell) -> None:
    """All cases with all servers."""
    for name in servers:
        try:
            await _one(name, scale, tell)
        except (RuntimeError, OSError) as error:
            tell(Found(PART, next(iter(CASES)), name, reason=str(error)))
