"""Chaos: what is lost while workers are killed, rolled, added and taken away, and servers restarted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.operations.journal import JOURNAL_VARIABLE, Journal
from benchmarks.operations.load import OF_THE_KILLED, Failure, Killed, Load, Loss, begun_twice, losses
from benchmarks.operations.longtail import quantile
from benchmarks.operations.owners import accepted
from benchmarks.operations.results import Found, Scale, Tell
from benchmarks.operations.servers import WORKERS, serving, stopped, wait_served, wait_settled
from benchmarks.peers import REFERENCE, ROOT, Running, free_port
from benchmarks.proc import tree

PART = "chaos"
SERVERS = (REFERENCE, "uvicorn", "gunicorn", "granian")

_SEEN_WITHIN_S = 3.0
_ROLLED_WITHIN_S = 20.0
_STOPPED_WITHIN_S = 40.0
_BOUND_WITHIN_S = 30.0
_PROMOTED_WITHIN_S = 1.5  # gunicorn's new master looks once a second whether the old one has gone
_TOLD = 5
_STALLED_S = 0.9  # a SYN that was dropped is sent again after a second
#: A kill every second is what it is to survive here; with its defaults it would say that the application
#: is broken, and give up.
_SURVIVE = ("--restart-limit", "100000", "--restart-backoff-max", "0.1")


@dataclass
class Stage:
    """What a case acts upon.

    Attributes:
        name: of the server.
        setup: how another one is started.
        running: the servers; all are stopped at the end.
        seconds: how long acts begin; the last one may end later.
        end_s: time.monotonic() at which no further act begins.
        acts: how often the case has done what it does.
        undone: acts whose effect was not seen in time.
    """

    name: str
    setup: dict[str, Any]
    stack: contextlib.ExitStack
    load: Load
    killed: Killed
    seconds: float = 0.0
    end_s: float = 0.0
    running: list[Running] = field(default_factory=list)
    root: int = 0
    acts: int = 0
    undone: int = 0

    def more(self) -> bool:
        """Whether there is time for another act."""
        return time.monotonic() < self.end_s

    def workers(self) -> list[int]:
        """Those that have answered and live, as far as we know."""
        alive = tree(self.root) - set(self.killed.pids)
        return sorted(pid for pid in self.load.workers if pid in alive)

    async def wait(self, condition: Callable[[], object], within_s: float) -> bool:
        """Look until it is true; False when the time is over."""
        end = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > end:
                return False
            await asyncio.sleep(0.03)
        return True

    async def seen(self) -> None:
        """Until all workers have answered; a server may leave one of them idle, so not for long."""
        await self.wait(lambda: len(self.workers()) >= WORKERS, _SEEN_WITHIN_S)

    async def start(self, **more: Any) -> Running:
        """Another server, not yet ready."""
        return self.stack.enter_context(serving(self.name, **{**self.setup, **more}))


async def kill(stage: Stage) -> None:
    """Stopped for the moment in which its connections are looked up, then killed."""
    chance = random.Random(1)
    while stage.more():
        if victims := stage.workers():
            pid = chance.choice(victims)
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.kill(pid, signal.SIGSTOP)
                stage.killed.note(pid, accepted(pid, stage.setup["port"]))
                os.kill(pid, signal.SIGKILL)
                stage.acts += 1
        await asyncio.sleep(1)


async def roll(stage: Stage) -> None:
    """SIGHUP; the next one when all that worked before have gone."""
    while stage.more():
        await stage.seen()
        before = set(stage.workers())
        os.kill(stage.root, signal.SIGHUP)
        if not await stage.wait(lambda before=before: not before & tree(stage.root), _ROLLED_WITHIN_S):
            stage.undone += 1
        stage.acts += 1


async def more_and_less(stage: Stage) -> None:
    """SIGTTIN and SIGTTOU in turns, every 0.5 s."""
    while stage.more():
        for number in (signal.SIGTTIN, signal.SIGTTOU):
            os.kill(stage.root, number)
            stage.acts += 1
            await asyncio.sleep(0.5)


async def restart(stage: Stage) -> None:
    """SIGTERM to one of the servers behind the proxy, and start it again; then the other one."""
    at = 0
    while stage.more():
        leaving = stage.running[at]
        if not await stopped(leaving, _STOPPED_WITHIN_S):
            stage.undone += 1
            leaving.stop()
        stage.running[at] = await stage.start(port=leaving.port)
        await wait_served(stage.running[at])
        stage.acts += 1
        at = 1 - at
        await asyncio.sleep(0.3)


async def succeed(stage: Stage) -> None:
    """SIGKILL to the supervisor; a new one is started at once, and again until it can bind."""
    while stage.more():
        for pid in stage.workers():  # they go with it
            stage.killed.note(pid, set())
        stage.running[0].process.kill()
        stage.running[0].process.wait()
        stage.acts += 1
        end = time.monotonic() + _BOUND_WITHIN_S
        while not await _succeeded(stage):
            if time.monotonic() > end:
                raise RuntimeError(f"no new supervisor serves within {_BOUND_WITHIN_S} s")
        await asyncio.sleep(2)


async def _succeeded(stage: Stage) -> bool:
    """Start a server in the place of the first, until one of its own workers answers; False if it ends.

    Workers of the old one may answer for a while, and keep the new one from binding.
    """
    stage.running[0] = await stage.start()
    stage.root = stage.running[0].pid
    ended = stage.running[0].process.poll
    await stage.wait(lambda: stage.workers() or ended() is not None, _BOUND_WITHIN_S)
    return ended() is None and bool(stage.workers())


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def parent(pid: int) -> int:
    """The process above; 0 when there is no such process any more."""
    try:
        state, above, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state == "Z" else int(above)


async def upgrade(stage: Stage) -> None:
    """SIGUSR2; the next one when the workers of before have gone.

    Where the old supervisor stays beside the new one (gunicorn), SIGTERM once the new one serves.
    """
    while stage.more():
        await stage.seen()
        old = stage.root
        before = set(stage.workers())

        def fresh(before: set[int] = before) -> list[int]:
            return [pid for pid in stage.load.workers if pid not in before and parent(pid)]

        def replaced(old: int = old, before: set[int] = before) -> bool:
            return not any(map(parent, before)) and (stage.root == old or not parent(old))

        os.kill(old, signal.SIGUSR2)
        stage.acts += 1
        if not await stage.wait(lambda fresh=fresh: len(fresh()) >= WORKERS, _ROLLED_WITHIN_S):
            stage.undone += 1
            continue
        stage.root = parent(fresh()[-1]) or old
        if stage.root != old and stage.name != REFERENCE:
            os.kill(old, signal.SIGTERM)
        if not await stage.wait(replaced, _ROLLED_WITHIN_S):
            stage.undone += 1
        if stage.name != REFERENCE:
            await asyncio.sleep(_PROMOTED_WITHIN_S)


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of trouble.

    Attributes:
        act: does it again and again.
        allowed: what may be lost; all else is a fault.
        servers: who knows it.
        proxy: the program in front of two servers.
        arguments: server to further ones.
        needs: a signal that the server has to know.
        inherited: the listening socket is ours.
    """

    title: str
    act: Callable[[Stage], Awaitable[None]]
    allowed: frozenset[Loss] = frozenset()
    servers: tuple[str, ...] = SERVERS
    proxy: str = ""
    arguments: dict[str, tuple[str, ...]] = field(default_factory=dict)
    needs: signal.Signals | None = None
    inherited: bool = False


CASES: dict[str, Case] = {
    "kill": Case(
        "a random worker killed (-9) every second", kill, OF_THE_KILLED, arguments={REFERENCE: _SURVIVE}
    ),
    "roll": Case("SIGHUP rolls, back to back", roll),
    "workers": Case(
        "SIGTTIN and SIGTTOU in turns every 0.5 s", more_and_less, servers=(REFERENCE, "uvicorn", "gunicorn")
    ),
    "haproxy": Case(
        "two servers behind haproxy, restarted (SIGTERM) one after the other", restart, proxy="haproxy"
    ),
    "nginx": Case(
        "two servers behind nginx, restarted (SIGTERM) one after the other", restart, proxy="nginx"
    ),
    "supervisor": Case(
        "supervisor killed (-9) and a new one started", succeed, OF_THE_KILLED | {Loss.REFUSED},
        servers=(REFERENCE, "gunicorn"),
    ),
    "socket": Case(
        "the same, the listening socket inherited from somebody who lives on (systemd)", succeed,
        OF_THE_KILLED, servers=(REFERENCE,), inherited=True,
    ),
    "upgrade": Case(
        "supervisor replaced (SIGUSR2), back to back", upgrade, servers=(REFERENCE, "gunicorn"),
        needs=signal.SIGUSR2,
    ),
}


def _proxy(program: str, folder: Path, servers: list[int]) -> Any:
    """One of the proxies of the tests: their configurations are known to be right."""
    if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin") is None:
        raise RuntimeError(f"no {program} on this machine (Debian: apt-get install {program})")
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))
    import proxies

    kind = {"haproxy": proxies.Haproxy, "nginx": proxies.Nginx}[program]
    return kind(folder, servers, pool=32, again="unsent")


async def _act_under_load(stage: Stage, case: Case) -> None:
    loading = asyncio.create_task(stage.load.run())
    acting = asyncio.ensure_future(case.act(stage))
    try:
        await asyncio.wait((loading, acting), return_when=asyncio.FIRST_COMPLETED)
        if acting.done():
            await acting
            await asyncio.sleep(1)  # what the last act has done to others shows
    finally:
        acting.cancel()
        stage.load.stop()
        await asyncio.gather(loading, acting, return_exceptions=True)
    await loading


async def _stage(case: Case, name: str, seconds: float, folder: Path, stack: contextlib.ExitStack) -> Stage:
    """The servers, the proxy, and nobody asks anything yet."""
    setup = {
        "port": free_port(), "arguments": case.arguments.get(name, ()),
        "environment": {JOURNAL_VARIABLE: str(folder / "journal")},
    }
    if case.inherited:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", setup["port"]), backlog=2048))
        number = listener.fileno()
        setup |= {"descriptors": (number,), "arguments": (*setup["arguments"], "--fd", str(number))}
    stage = Stage(name, setup, stack, Load(setup["port"]), Killed(), seconds)
    stage.running.append(await stage.start())
    stage.root = stage.running[0].pid
    if case.proxy:
        stage.running.append(await stage.start(port=free_port()))
    for server in stage.running:
        await wait_served(server)
        await wait_settled(server.port, WORKERS)
    if case.proxy:
        proxy = _proxy(case.proxy, folder / "proxy", [server.port for server in stage.running])
        await asyncio.to_thread(stack.enter_context, proxy)
        stage.load = Load(proxy.port)
    stack.callback(_end_successor, stage)
    stage.end_s = time.monotonic() + seconds
    return stage


def _end_successor(stage: Stage) -> None:
    """A supervisor that another has left in its place may have left that one's process group, too."""
    if stage.root not in [server.pid for server in stage.running] and parent(stage.root):
        for pid in tree(stage.root):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _figures(stage: Stage, case: Case, journal: Journal) -> dict[str, float]:
    found = losses(stage.load, stage.killed, journal)
    latencies = stage.load.latencies
    return {
        "seconds": stage.seconds, "acts": stage.acts, "undone": stage.undone, "answered": len(latencies),
        "at fault": sum(count for loss, count in found.items() if loss not in case.allowed),
        **{loss.value: count for loss, count in found.items()},
        "begun twice": begun_twice(stage.load, journal), "idle closed": stage.load.idle_closed,
        "p50": quantile(latencies, 0.5), "p99": quantile(latencies, 0.99), "max": max(latencies),
        "stalled": sum(one >= _STALLED_S for one in latencies), "silence": stage.load.longest_silence_s,
    }


def _tell_faults(stage: Stage, case: Case, journal: Journal) -> None:
    """Some of them, for whoever looks for the cause."""
    def loss(failure: Failure) -> Loss:
        return stage.killed.judge(failure, journal)

    faults = [one for one in stage.load.failures if loss(one) not in case.allowed]
    for one in faults[:_TOLD]:
        when_s = one.when_s - stage.end_s
        pid, times = journal.begun(one.number)
        told = f"{loss(one)}; {one.told}; begun by {pid}, {times} times"
        print(f"  {when_s:+.3f} s from the end: {told}", file=sys.stderr)


async def _one(key: str, name: str, seconds: float) -> Found:
    case = CASES[key]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        journal = Journal(folder / "journal")
        stack.callback(journal.close)
        try:
            stage = await _stage(case, name, seconds, folder, stack)
            if case.needs and not catches(stage.root, case.needs):
                return Found(PART, key, name, reason=f"does not know {case.needs.name}")
            await _act_under_load(stage, case)
        except (RuntimeError, OSError, AssertionError) as error:
            return Found(PART, key, name, reason=str(error) or repr(error))
        if not stage.load.latencies:
            return Found(PART, key, name, reason="no answer at all")
        if name == REFERENCE:
            _tell_faults(stage, case, journal)
        return Found(PART, key, name, figures=_figures(stage, case, journal))


async def run(servers: list[str], scale: Scale, tell: Tell, cases: list[str]) -> None:
    """All cases, each with all servers that know it."""
    for key in cases:
        for name in (one for one in servers if one in CASES[key].servers):
            tell(await _one(key, name, scale.seconds if name == REFERENCE else scale.peer_seconds))
