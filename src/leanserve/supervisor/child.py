"""One worker process as the supervisor sees it."""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from math import inf
from typing import Any, ClassVar

from leanserve.channel import Channel, WorkerSpec
from leanserve.errors import SettingsError
from leanserve.machine import Machine
from leanserve.supervisor.signals import HANDLED

__all__ = ["Child", "ChildMachine", "ChildMove", "ChildState", "fork_worker", "spawn_worker"]


class ChildState(IntEnum):
    """Where a worker process is in its life."""

    STARTING = 0  # imports, loads, runs its lifespan startup
    READY = 1
    RETIRING = 2  # told to finish and leave
    KILLED = 3  # SIGKILL is sent
    REAPED = 4  # its exit status is known


class ChildMove(IntEnum):
    """What can happen to it."""

    TOLD_READY = 0
    RETIRE = 1
    KILL = 2
    REAP = 3


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
    machine: ChildMachine = field(default_factory=ChildMachine)

    @property
    def state(self) -> ChildState:
        """Its place in the table."""
        return self.machine.state

    def retire(self, order: str, kill_at_s: float) -> None:
        """Tell it to leave: by the channel once it listens there, by SIGTERM while it boots.

        A boot has no loop that could read an order, and SIGTERM has its default effect then.
        """
        booting = self.state is ChildState.STARTING
        self.machine.advance(ChildMove.RETIRE)
        self.kill_at_s = min(self.kill_at_s, kill_at_s)
        heard = self.channel.send({"order": order})
        if booting or not heard:  # an application may close descriptors that are not its own
            self.signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: it had its time."""
        self.machine.advance(ChildMove.KILL)
        self.kill_at_s = inf
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
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


def resolve(name: str) -> Callable[[WorkerSpec], int]:
    """The function of a dotted name ``package.module:attribute``; the parent may not import it itself."""
    module, _, attribute = name.partition(":")
    found: Callable[[WorkerSpec], int] = getattr(importlib.import_module(module), attribute)
    return found


def fork_worker(spec: WorkerSpec, entry: str, leave: Callable[[], None]) -> int:
    """Fork a worker; return its pid. `leave` runs in the child and drops what is the parent's alone."""
    _flush()
    # A signal that comes between the fork and the child's own set-up must wait, not vanish in our handlers.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    code = 1
    try:
        leave()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        atexit._clear()  # the parent's; what the application registers from here on is run
        code = resolve(entry)(spec)
        threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing ends its processes
        atexit._run_exitfuncs()
    finally:
        # Whatever happened: the parent's frames lie below, with cleaning up that is not this process's to do.
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        try:
            _flush()
        finally:
            os._exit(code)


def _flush() -> None:
    """Empty the buffers, so that nothing is written twice; a full disk is no reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            pass


def spawn_worker(spec: WorkerSpec, entry: str) -> int:
    """Start a worker in a fresh interpreter; return its pid.

    Raises:
        SettingsError: the application or a setting cannot be handed to another process.
    """
    module = entry.partition(":")[0]
    listeners = [[sock.fileno() for sock in slot] for slot in spec.listeners]
    facts: dict[str, Any] = {
        name: getattr(spec, name)
        for name in ("app", "settings", "slot", "generation", "scoreboard_fd", "lane", "parent_pid", "born_s")
    }
    facts |= {"channel": spec.channel.fileno(), "listeners": listeners}
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
        if spec.scoreboard_fd >= 0:
            inherited.add(spec.scoreboard_fd)
        process = subprocess.Popen([sys.executable, "-c", code], pass_fds=sorted(inherited))
    process.returncode = 0  # the supervisor waits for the pid itself; Popen must not
    return process.pid
