"""One worker process as the supervisor sees it."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from math import inf
from typing import ClassVar

from leanserve.channel import DUMP_SIGNAL, AdminSpec, Channel, TemplateSpec, WorkerSpec
from leanserve.errors import SettingsError
from leanserve.flight import Flight, describe_flights
from leanserve.forking import Collector, end_with, flush_streams, resolve
from leanserve.machine import Machine
from leanserve.scoreboard import Record
from leanserve.supervisor.signals import HANDLED
from leanserve.workerenv import environment_of

__all__ = [
    "Child",
    "ChildMachine",
    "ChildMove",
    "ChildState",
    "describe_exit",
    "fork_worker",
    "reap_strangers",
    "spawn_worker",
]


class ChildState(IntEnum):
    """Where a worker process is in its life."""

    STARTING = 0  # imports, loads, runs its lifespan startup
    READY = 1
    LATE = 2  # its loop stands still for longer than hang_limit: it is being ended, which is a crash
    RETIRING = 3  # told to finish and leave
    KILLED = 4  # SIGKILL is sent
    REAPED = 5  # its exit status is known


class ChildMove(IntEnum):
    """What can happen to it."""

    TOLD_READY = 0
    RETIRE = 1
    KILL = 2
    REAP = 3
    HANG = 4


class ChildMachine(Machine[ChildState, ChildMove]):
    """A worker may announce itself ready while it is being told to leave; nothing but an exit ends it."""

    __slots__ = ()
    START: ClassVar[IntEnum] = ChildState.STARTING
    TABLE: ClassVar = {
        (ChildState.STARTING, ChildMove.TOLD_READY): ChildState.READY,
        (ChildState.STARTING, ChildMove.RETIRE): ChildState.RETIRING,
        (ChildState.STARTING, ChildMove.KILL): ChildState.KILLED,
        (ChildState.STARTING, ChildMove.REAP): ChildState.REAPED,
        (ChildState.READY, ChildMove.TOLD_READY): ChildState.READY,
        (ChildState.READY, ChildMove.RETIRE): ChildState.RETIRING,
        (ChildState.READY, ChildMove.KILL): ChildState.KILLED,
        (ChildState.READY, ChildMove.REAP): ChildState.REAPED,
        (ChildState.READY, ChildMove.HANG): ChildState.LATE,
        (ChildState.LATE, ChildMove.TOLD_READY): ChildState.LATE,
        (ChildState.LATE, ChildMove.RETIRE): ChildState.RETIRING,
        (ChildState.LATE, ChildMove.KILL): ChildState.LATE,
        (ChildState.LATE, ChildMove.REAP): ChildState.REAPED,
        (ChildState.RETIRING, ChildMove.TOLD_READY): ChildState.RETIRING,
        (ChildState.RETIRING, ChildMove.RETIRE): ChildState.RETIRING,
        (ChildState.RETIRING, ChildMove.KILL): ChildState.KILLED,
        (ChildState.RETIRING, ChildMove.REAP): ChildState.REAPED,
        (ChildState.KILLED, ChildMove.TOLD_READY): ChildState.KILLED,
        (ChildState.KILLED, ChildMove.RETIRE): ChildState.KILLED,
        (ChildState.KILLED, ChildMove.KILL): ChildState.KILLED,
        (ChildState.KILLED, ChildMove.REAP): ChildState.REAPED,
    }


@dataclass(slots=True, eq=False)
class Child:
    """A worker process.

    Attributes:
        born_s, kill_at_s: monotonic seconds; `kill_at_s` is inf while there is nothing to wait out.
        error, trace: what it said when its boot failed.
        booted: it was ready once.
        loops: workers that run in it, in slots of their own from `slot` on.
        flights: what it had at work when it ended.
        listeners: sockets that stop to listen when it ends: nobody takes its slot over.
    """

    pid: int
    slot: int
    generation: int
    lane: int
    channel: Channel
    born_s: float
    kill_at_s: float = inf
    error: str = ""
    trace: str = ""
    booted: bool = False
    loops: int = 1
    flights: list[Flight] = field(default_factory=list)
    listeners: Sequence[socket.socket] = ()
    machine: ChildMachine = field(default_factory=ChildMachine)

    @property
    def state(self) -> ChildState:
        """Its place in the table."""
        return self.machine.state

    @property
    def slots(self) -> range:
        """Those that it takes."""
        return range(self.slot, self.slot + self.loops)

    def __str__(self) -> str:
        last = f"-{self.slot + self.loops}" if self.loops > 1 else ""
        return f"{self.slot + 1}{last} (pid {self.pid})"

    def describe_work(self, records: Sequence[Record]) -> str:
        """What it had at work when it ended: how many, and which."""
        if not records:
            return "0"
        in_flight = sum(record.in_flight for record in records)
        tick_s = max(record.heartbeat_ns for record in records) / 1e9
        return f"{in_flight}{describe_flights(self.flights, in_flight, time.monotonic(), tick_s)}"

    def describe_end(self, code: int) -> str:
        """Why it ended: its own words, or what its exit code says."""
        return self.error or describe_exit(code)

    def retire(self, order: str, kill_at_s: float) -> None:
        """Tell it to leave: by the channel once it listens there, by SIGTERM while it boots.

        A boot has no loop that could read an order, and SIGTERM has its default effect then.
        """
        booting = self.state is ChildState.STARTING
        if self.machine.advance(ChildMove.RETIRE) is ChildState.RETIRING:
            self.kill_at_s = min(self.kill_at_s, kill_at_s)
        # The order before the signal: one that is ready just now takes the order, not the signal.
        heard = self.channel.send({"order": order})
        if booting or not heard:  # an application may close descriptors that are not its own
            self.signal(signal.SIGTERM)

    def end_late(self, limit_s: float, kill_at_s: float) -> None:
        """Its loop stands still: have it write where, end it, and let it be a crash."""
        self.machine.advance(ChildMove.HANG)
        self.error = f"its loop stood still for more than {limit_s:g} s (hang_limit)"
        self.kill_at_s = kill_at_s
        if DUMP_SIGNAL:
            self.signal(DUMP_SIGNAL)
        self.signal(signal.SIGTERM)

    def kill(self, *, with_family: bool = False) -> None:
        """SIGKILL: it had its time.

        Args:
            with_family: what the application has started, too (pools of processes). They would live on with
                the old code, and hold the port.
        """
        self.machine.advance(ChildMove.KILL)
        self.kill_at_s = inf
        for pid in _descend(self.pid) if with_family else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Send a signal. The pid cannot have been reused: only :meth:`wait` frees it."""
        if self.state is not ChildState.REAPED:
            os.kill(self.pid, number)

    def wait(self) -> int | None:
        """Its exit code if it has ended (negative: the signal that ended it), else None. Once."""
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            # Somebody else in this process waits for every child; the code is lost, the end is certain.
            pid, status = self.pid, 0
        if pid != self.pid:
            return None
        return os.waitstatus_to_exitcode(status)

    def bury(self) -> None:
        """It has ended: close what was its."""
        self.machine.advance(ChildMove.REAP)
        self.channel.close()
        for sock in self.listeners:
            # Its siblings have inherited copies; to close ours alone would leave a queue that nobody empties.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def fork_worker(
    spec: WorkerSpec | AdminSpec | TemplateSpec, entry: str, leave: Callable[[], None]
) -> int:
    """Fork a worker, the admin process or a template; return its pid.

    `leave` runs in the child and drops what is the parent's alone.
    """
    flush_streams()
    # A signal that comes between the fork and the child's own set-up must wait, not vanish in our handlers.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid

    def run() -> int:
        leave()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        collects = gc.isenabled()
        gc.disable()  # for the imports, as in Collector
        main = resolve(entry)
        Collector.end_imports()
        if collects:
            gc.enable()
        return main(spec)

    return end_with(run)


def spawn_worker(spec: WorkerSpec, entry: str) -> int:
    """Start a worker in a fresh interpreter; return its pid.

    Raises:
        SettingsError: the application or a setting cannot be handed to another process.
    """
    import pickle
    import subprocess
    import tempfile

    module = entry.partition(":")[0]
    listeners = [[sock.fileno() for sock in slot] for slot in spec.listeners]
    facts = spec.facts() | {"channel": spec.channel.fileno(), "listeners": listeners}
    with tempfile.TemporaryFile() as file:
        try:
            pickle.dump(facts, file)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise SettingsError(f"start_method=spawn needs names, not objects: {error}") from error
        file.seek(0)
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from {module} import main_of_spawned as m; sys.exit(m({file.fileno()}))"
        )
        inherited = {file.fileno(), spec.channel.fileno(), *(fd for slot in listeners for fd in slot)}
        inherited.update(fd for pair in spec.tokens for fd in pair)
        if spec.scoreboard_fd >= 0:
            inherited.add(spec.scoreboard_fd)
        # Before the interpreter: that and the C library read some variables when they start.
        environment = os.environ | environment_of(spec.settings.pool.worker_env, spec.slot)
        process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=sorted(inherited), env=environment
        )
    process.returncode = 0  # the supervisor waits for the pid itself; Popen must not
    return process.pid


def describe_exit(code: int) -> str:
    """What an exit code (negative: the signal) says, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:  # most real-time signals have no name
        return f"signal {-code}"


def reap_strangers(ours: Collection[int]) -> None:
    """As PID 1 of a container we inherit the orphans of others, and nobody else waits for them.

    Looking before taking leaves the workers' exit codes to those who want them.
    """
    try:
        while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if found.si_pid in ours:
                return  # another turn of the loop takes it; its SIGCHLD has come
            os.waitpid(found.si_pid, os.WNOHANG)
    except ChildProcessError:
        pass  # none left


def _descend(pid: int) -> list[int]:
    """The processes below one, where the kernel tells (Linux)."""
    found, level = [], [pid]
    while level:
        parent = level.pop()
        found.append(parent)
        with contextlib.suppress(OSError):  # one that ends meanwhile, or another system
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children", encoding="ascii") as file:
                    level += map(int, file.read().split())
    return found[1:]
