"""Who is measured: the peers of the other benchmarks, with what keeps their workers in number."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.operations.client import Ended, once
from benchmarks.peers import REFERENCE, Running, Setup, answers, missing, started

APP = "benchmarks.operations.app:app"
WORKERS = 4
SHARED = "leanserve-shared"
_SETTLED_WITHIN_S = 8.0


@dataclass(frozen=True, slots=True)
class Server:
    """A peer (see benchmarks.peers) with further arguments."""

    peer: str
    arguments: tuple[str, ...] = ()


SERVERS: dict[str, Server] = {
    REFERENCE: Server(REFERENCE),
    SHARED: Server(REFERENCE, ("--accept", "shared")),
    "uvicorn": Server("uvicorn-httptools"),
    "gunicorn": Server("gunicorn-asgi"),
    "granian": Server("granian", ("--respawn-failed-workers",)),
}


def absent(names: list[str]) -> dict[str, list[str]]:
    """Server to the packages that it needs and that are not installed."""
    return {name: packages for name in names if (packages := missing(SERVERS[name].peer))}


def started_server(name: str, setup: Setup) -> contextlib.AbstractContextManager[Running]:
    """As benchmarks.peers.started()."""
    server = SERVERS[name]
    return started(server.peer, replace(setup, arguments=(*server.arguments, *setup.arguments)))


async def wait_settled(port: int, workers: int) -> set[int]:
    """Until so many processes have answered, or for some seconds: a server may leave one of them idle.

    Requests that hold their worker for some milliseconds, many at a time, so that each gets one.
    """
    seen: set[int] = set()
    end = time.monotonic() + _SETTLED_WITHIN_S
    while len(seen) < workers and time.monotonic() < end:
        asked = (once(port, "/block?ms=10") for _ in range(4 * workers))
        found = await asyncio.gather(*asked, return_exceptions=True)
        seen |= {one.pid for one in found if not isinstance(one, BaseException)}
        for one in found:
            if isinstance(one, BaseException) and not isinstance(one, (OSError, Ended, TimeoutError)):
                raise one
    return seen


async def wait_served(server: Running) -> None:
    """Until a GET is answered. RuntimeError when the server ends before, or takes too long."""
    await asyncio.to_thread(server.wait, answers)


@contextlib.contextmanager
def serving(name: str, **setup: object) -> Iterator[Running]:
    """A server of this application with WORKERS workers, or as `setup` says."""
    facts = {"app": APP, "workers": WORKERS, **setup}
    with started_server(name, Setup(**facts)) as server:  # type: ignore[arg-type]
        yield server


async def stopped(server: Running, within_s: float) -> bool:
    """SIGTERM, and wait; False when it takes longer (then it is killed with its group at the end)."""
    server.process.send_signal(signal.SIGTERM)
    end = time.monotonic() + within_s
    while server.process.poll() is None and time.monotonic() < end:
        await asyncio.sleep(0.01)
    return server.process.returncode is not None
