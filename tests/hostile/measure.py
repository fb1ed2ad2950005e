"""A server under attack, beside good clients: what is looked at before, while and after."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import uvloop

from harness import Certificates, descendants, free_port, wait_until
from hostile.attacks import Attack
from hostile.peer import Outcomes, Target
from leanserve.settings import options

TESTS = Path(__file__).parents[1]
COMMAND = (
    f"{sys.executable} -m leanserve hostile.app:app --port {{port}} --no-access-log --ws-per-message-deflate"
)
SETTINGS = {item.name for _, item, _ in options()}
# A quick run waits for no deadline of many seconds. Names that are no settings yet are left out.
QUICK = {
    "first_byte_timeout": 0.5, "header_timeout": 0.5, "body_timeout": 0.5, "send_timeout": 0.5,
    "tls_handshake_timeout": 0.5, "linger_timeout": 0.5,
}
# What a worker may hold no more of than before.
HELD = ("fds", "tasks", "protocols")
_WARM_HOLD_S = 3.0
_SETTLE_S = 30.0
_LEAST_S = 0.2  # in which good clients have their say
_HOLD_S = 3.0
_HOLD_QUICK_S = 1.0
_HOLD_FOR_NOTHING_S = 15.0  # where no deadline would end the peers
_ATTACK_WITHIN_S = 300.0


@dataclass
class Row:
    """What one attack has shown.

    Attributes:
        outcomes: connections, by what became of them.
        longest_s: the longest life of one, for slow peers.
        alive: whether the processes are the same as before.
        fds, tasks, protocols: left in the worker, more than before.
        rss_ratio: resident memory, against that behind a first round of the same attack.
        busy_ms: most CPU time of the loop's thread at one stretch.
        stall_ms: longest time that the loop did not come round, whatever the machine had to do.
        calm_p99_ms: of good clients of a second server, which nobody attacks, at the same time.
        p99_ratio: of the good clients of the attacked server, against that.
        good: their requests while it ran.
        faults: what must not be, and does not depend on time.
    """

    attack: str
    connections: int
    seconds: float
    outcomes: dict[str, int]
    longest_s: float
    alive: bool
    fds: int
    tasks: int
    protocols: int
    rss_ratio: float
    rss_mib: float
    busy_ms: float
    stall_ms: float
    calm_p99_ms: float
    p99_ratio: float
    good: int
    faults: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Server:
    """A server of the application under attack, in a session of its own; a context manager."""

    def __init__(self, command: str, log: Path, certificates: Certificates | None, quick: bool) -> None:
        self.port = free_port()
        self.log = log
        self.certificates = certificates
        self._command = shlex.split(command.format(port=self.port))
        if certificates is not None:
            self._command += certificates.options()
        self._environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        }
        if quick:
            self._environment |= {
                f"LEANSERVE_{name.upper()}": str(value) for name, value in QUICK.items() if name in SETTINGS
            }

    def __enter__(self) -> Server:
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=TESTS,
                start_new_session=True, env=self._environment,
            )
        try:
            wait_until(self._answers, 30, f"an answer of the server: {self._command}")
        except BaseException as error:
            self._kill()
            error.add_note(self.output)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            pass  # what it still has is not this measurement's business
        self._kill()

    def _kill(self) -> None:
        # Its own session, made by us: the group holds this server's processes and no others.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"exit code {self.process.returncode}"
        try:
            return bool(self.probe())
        except (OSError, http.client.HTTPException):
            return False

    @property
    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text("utf-8", "replace")

    @property
    def pids(self) -> set[int]:
        """Its processes."""
        return {self.process.pid} | descendants(self.process.pid) if self.process.poll() is None else set()

    def probe(self, collect: bool = False) -> dict[str, Any]:
        """How the worker feels, on a connection of its own; with `collect` behind a garbage collection."""
        if self.certificates is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        else:
            connection = http.client.HTTPSConnection(
                "localhost", self.port, timeout=20, context=self.certificates.client_context()
            )
        try:
            path = "/probe?collect" if collect else "/probe"
            connection.request("GET", path, headers={"connection": "close"})
            found: dict[str, Any] = json.loads(connection.getresponse().read())
            return found
        finally:
            connection.close()


class GoodClients:
    """`hostile.good`, in a process; a context manager."""

    def __init__(self, server: Server) -> None:
        self._command = [sys.executable, "-m", "hostile.good", str(server.port)]
        if server.certificates is not None:
            self._command.append(str(server.certificates.authority))

    def __enter__(self) -> GoodClients:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=TESTS, text=True
        )
        self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def take(self) -> dict[str, Any]:
        """What became of their requests since the last call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found


def _settled(server: Server, base: dict[str, Any]) -> dict[str, Any]:
    """Wait until the worker holds no more than it did; how it feels then, or when the time is over."""
    end = time.monotonic() + _SETTLE_S
    while True:
        now = server.probe(collect=True)
        if all(now[what] <= base[what] for what in HELD) or time.monotonic() > end:
            return now
        time.sleep(0.05)


class Beside:
    """Good clients of the attacked server, and of its twin that nobody attacks."""

    def __init__(self, good: GoodClients, calm: GoodClients) -> None:
        self._good, self._calm = good, calm
        self.failures: list[str] = []

    def look(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What became of the requests of both since the last look."""
        seen = self._good.take(), self._calm.take()
        self.failures += [failure for one in seen for failure in one["failures"]]
        return seen


@contextlib.contextmanager
def attacked(
    command: str, folder: Path, certificates: Certificates | None, quick: bool
) -> Iterator[tuple[Server, Beside]]:
    """The server to attack, its twin, and the good clients of both."""
    with (
        Server(command, folder / "server.log", certificates, quick) as server,
        Server(command, folder / "twin.log", certificates, quick) as twin,
        GoodClients(server) as good,
        GoodClients(twin) as calm,
    ):
        yield server, Beside(good, calm)


async def _attack(attack: Attack, count: int, target: Target, beside: Beside) -> Outcomes:
    """Run it. Where peers are slow, the look behind it tells of the time from when all of them stand."""
    outcomes = Outcomes()
    async with asyncio.timeout(_ATTACK_WITHIN_S):
        run = asyncio.ensure_future(attack.run(target, count, outcomes))
        beside.look()
        least = asyncio.ensure_future(asyncio.sleep(_LEAST_S))
        if attack.hold_s is not None:
            held = asyncio.ensure_future(outcomes.held.wait())
            await asyncio.wait({run, held}, return_when="FIRST_COMPLETED")
            held.cancel()
            beside.look()
        await run
        await least
    return outcomes


def measure(server: Server, beside: Beside, name: str, attack: Attack, quick: bool) -> Row:
    """One attack, twice unless quick: the first round makes the memory grow to what such an attack needs."""
    count = attack.quick if quick else attack.full
    hold_s = _HOLD_QUICK_S if quick else attack.hold_s or _HOLD_S
    if attack.ended_by is not None and attack.ended_by not in SETTINGS:
        hold_s = min(hold_s, _HOLD_FOR_NOTHING_S)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        pids, held = server.pids, server.probe(collect=True)
        if not quick:
            first = Target(server.port, min(hold_s, _WARM_HOLD_S))
            runner.run(_attack(attack, count, first, beside))
        base = _settled(server, held)
        server.probe()
        begun = time.monotonic()
        outcomes = runner.run(_attack(attack, count, Target(server.port, hold_s), beside))
        seconds = time.monotonic() - begun
        good, calm = beside.look()
        now = server.probe()
    then = _settled(server, held)
    beside.look()
    row = Row(
        name, count, seconds, dict(outcomes.counts), outcomes.longest_s, server.pids == pids,
        *(then[what] - held[what] for what in HELD),
        rss_ratio=then["rss"] / base["rss"], rss_mib=then["rss"] / (1 << 20),
        busy_ms=now["busy_ms"], stall_ms=now["stall_ms"], calm_p99_ms=calm["p99_ms"],
        p99_ratio=good["p99_ms"] / calm["p99_ms"], good=good["count"],
    )
    row.faults += _faults(attack, row, beside.failures)
    beside.failures.clear()
    return row


def _faults(attack: Attack, row: Row, failures: list[str]) -> Iterator[str]:
    if not row.alive:
        yield "a process died"
    for what in HELD:
        if (left := getattr(row, what)) > 0:
            yield f"{left} {what} left"
    if failures:
        yield f"{len(failures)} good requests failed: {failures[0]}"
    allowed = attack.good
    if attack.ended_by is not None and attack.ended_by not in SETTINGS:
        allowed += ("held",)
    strange = {what: count for what, count in row.outcomes.items() if what not in allowed}
    if strange:
        yield f"outcomes that are not of {allowed}: {strange}"


