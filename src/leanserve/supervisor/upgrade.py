"""The old supervisor's side of an upgrade: it starts its own command anew, and leaves when that one serves.

Between the two runs a channel. From the new supervisor: ``{"event": "hello", "slots": 4}`` (its loop turns),
``{"event": "ready"}`` (each slot has a worker that accepts), ``{"event": "taken"}``, ``{"event": "failed",
"error": "..."}``. To it: ``{"order": "take"}`` (the server is yours), ``{"order": "speak", "roll": false}``
(to the service manager, who knows by now; and whether SIGHUP came meanwhile), ``{"order": "stop"}``,
``{"order": "hurry"}``, ``{"dead": 4711}`` (an old worker that ended). The end of the stream from the old one
before ``take`` means the same as ``take``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import sys
import time
from enum import IntEnum
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

from leanserve.activation import passed_sockets
from leanserve.channel import Channel
from leanserve.envfile import without_env_files
from leanserve.machine import Machine
from leanserve.supervisor.child import ChildState, describe_exit
from leanserve.supervisor.inherit import VARIABLE, describe_addresses
from leanserve.supervisor.signals import HANDLED
from leanserve.supervisor.states import SupervisorMove, SupervisorState, check_serving

if TYPE_CHECKING:
    from leanserve.supervisor.supervisor import Supervisor

__all__ = ["Upgrade", "UpgradeMachine", "UpgradeMove", "UpgradeState"]

logger = logging.getLogger("leanserve")

# How long the new supervisor may take until its workers are ready; a model may load for minutes.
_START_BUDGET_S = 600.0
# What one that is told to stop takes beside its workers.
_STOP_S = 3.0
_EXIT_NOT_EXECUTED = 126
# Programs that are PID 1 of a container for the sake of one child, and end with it.
_SMALL_INITS = ("catatonit", "docker-init", "dumb-init", "tini")
# While Python starts there, nobody hears them, and their default effect would be its end.
_IGNORED_AT_START = ("SIGHUP", "SIGUSR2", "SIGTTIN", "SIGTTOU")


class UpgradeState(IntEnum):
    """How far the new supervisor is."""

    NONE = 0  # there is none
    STARTING = 1  # its process was started and has not said a word
    BOOTING = 2  # its workers load
    TAKING = 3  # they are ready, and it was told to take over
    LEFT = 4  # it has
    ENDING = 5  # it was told to stop


class UpgradeMove(IntEnum):
    """What can happen to it."""

    START = 0
    HELLO = 1
    READY = 2
    TAKEN = 3
    STOP = 4
    GONE = 5


class UpgradeMachine(Machine[UpgradeState, UpgradeMove]):
    """Until it has taken over, its end is no more than a failed attempt; nothing leads back from LEFT."""

    __slots__ = ()
    START: ClassVar[IntEnum] = UpgradeState.NONE
    TABLE: ClassVar = {
        (UpgradeState.NONE, UpgradeMove.START): UpgradeState.STARTING,
        (UpgradeState.STARTING, UpgradeMove.HELLO): UpgradeState.BOOTING,
        (UpgradeState.STARTING, UpgradeMove.STOP): UpgradeState.ENDING,
        (UpgradeState.STARTING, UpgradeMove.GONE): UpgradeState.NONE,
        (UpgradeState.BOOTING, UpgradeMove.READY): UpgradeState.TAKING,
        (UpgradeState.BOOTING, UpgradeMove.STOP): UpgradeState.ENDING,
        (UpgradeState.BOOTING, UpgradeMove.GONE): UpgradeState.NONE,
        (UpgradeState.TAKING, UpgradeMove.READY): UpgradeState.TAKING,
        (UpgradeState.TAKING, UpgradeMove.TAKEN): UpgradeState.LEFT,
        (UpgradeState.TAKING, UpgradeMove.STOP): UpgradeState.ENDING,
        (UpgradeState.TAKING, UpgradeMove.GONE): UpgradeState.NONE,
        (UpgradeState.LEFT, UpgradeMove.READY): UpgradeState.LEFT,
        (UpgradeState.LEFT, UpgradeMove.GONE): UpgradeState.LEFT,
        (UpgradeState.ENDING, UpgradeMove.HELLO): UpgradeState.ENDING,
        (UpgradeState.ENDING, UpgradeMove.READY): UpgradeState.ENDING,
        (UpgradeState.ENDING, UpgradeMove.TAKEN): UpgradeState.ENDING,
        (UpgradeState.ENDING, UpgradeMove.STOP): UpgradeState.ENDING,
        (UpgradeState.ENDING, UpgradeMove.GONE): UpgradeState.NONE,
    }


class Upgrade:
    """Replaces the supervisor that it belongs to, by SIGUSR2 or by order.

    Attributes:
        budget_s: how long the new one may take until all its first workers are ready.
        channel: to the new supervisor, while there is one.
        wake_at_s: monotonic seconds at which :meth:`keep_time` has something to do.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self.machine = UpgradeMachine()
        self.budget_s = _START_BUDGET_S
        self.channel: Channel | None = None
        self.wake_at_s = inf
        self._supervisor = supervisor
        self._directory = _start_directory()
        self._pid = 0
        self._slots = 0
        self._error = ""
        self._roll_later = False
        self._to_hand_over = False
        supervisor.crew.leave_upgrade = self._leave_in_child

    def __repr__(self) -> str:
        return f"<Upgrade {self.machine.state.name} pid {self._pid}>"

    @property
    def under_way(self) -> bool:
        """Whether two supervisors hold the listeners, and this one is still the server."""
        return self.machine.state not in (UpgradeState.NONE, UpgradeState.LEFT)

    def order_to_stop(self, slot: int) -> str:
        """What a worker of the slot is told when this supervisor stops: an order of the channel's, by which
        listeners that are another supervisor's go on to listen."""
        if self.machine.state is UpgradeState.LEFT:
            return "retire" if slot < self._slots else "leave"
        return self._supervisor.inheritance.order_to_stop(slot)

    # Starting

    def start(self) -> str:
        """Start the new supervisor; says so. Raises ValueError: why it is not done."""
        self._check()
        try:
            self._fork()
        except OSError as error:
            raise ValueError(f"no process can be started: {error.strerror}") from None
        self.machine.advance(UpgradeMove.START)
        self._error, self._roll_later = "", False
        self._tell_partner(self._supervisor.slots)
        self.wake_at_s = time.monotonic() + self.budget_s
        self._supervisor.notifier.tell(f"STATUS=upgrading to supervisor pid {self._pid}")
        logger.info("upgrade: started supervisor pid %d", self._pid)
        return f"started supervisor pid {self._pid}, which takes over when its workers are ready"

    def on_signal(self) -> None:
        """SIGUSR2."""
        try:
            self.start()
        except ValueError as error:
            logger.error("no upgrade: %s", error)

    def _check(self) -> None:
        if self.under_way:
            raise ValueError(f"one is under way already (supervisor pid {self._pid})")
        if self.machine.state is UpgradeState.LEFT:
            raise ValueError("another supervisor has taken over")
        check_serving(self._supervisor.machine.state)
        if not self._supervisor.inheritance.owner:
            raise ValueError("this supervisor has not taken over yet from the one before it")
        if os.getpid() == 1:
            raise ValueError("the supervisor is PID 1, and the container ends with it; replace the container")
        if os.getppid() == 1 and (name := _name_of(1)) in _SMALL_INITS:
            raise ValueError(f"{name} ends the container when this process ends; replace the container")
        if not sys.executable or len(sys.orig_argv) < 2 or sys.orig_argv[1] == "-":
            raise ValueError("the command that started this process is not known")

    def _fork(self) -> None:
        supervisor = self._supervisor
        ours, theirs = Channel.pair()
        facts = {
            "from": os.getpid(),
            "channel": theirs.fileno(),
            "addresses": describe_addresses(supervisor.settings.listen),
            "listeners": supervisor.listeners.export(),
            "groups": supervisor.steering.export(),
            "control": supervisor.control.export(),
        }
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        try:
            self._pid = os.fork()
            if not self._pid:
                self._execute(facts, before)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self.channel = ours
        supervisor.selector.register(ours, selectors.EVENT_READ, self)

    def _execute(self, facts: dict[str, Any], mask: set[Any]) -> None:
        """In the child: become the new supervisor. Does not return."""
        try:
            # Our handlers would take a signal that has come by now, and forget it with the execution.
            for handled in HANDLED:
                ignored = handled.name in _IGNORED_AT_START
                signal.signal(handled, signal.SIG_IGN if ignored else signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            environment = _environment(facts)
            for number in (*_numbers(facts), *(number for number, _ in passed_sockets(environment))):
                os.set_inheritable(number, True)
            os.chdir(self._directory)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
        except BaseException as error:  # noqa: BLE001 - the parent's frames lie below, and are not ours to run
            os.write(2, f"leanserve: cannot execute {sys.executable}: {error}\n".encode())
        finally:
            os._exit(_EXIT_NOT_EXECUTED)

    # While both are there

    def hear(self) -> None:
        """Something came from the new supervisor."""
        if self.channel is None:  # it was heard to the end in this very turn
            return
        try:
            for message in self.channel.receive():
                event = message.get("event")
                if event == "hello":
                    self.machine.advance(UpgradeMove.HELLO)
                    self._slots = int(message["slots"])
                    self._tell_partner(min(self._slots, self._supervisor.slots))
                elif event == "ready":
                    first = self.machine.state is UpgradeState.BOOTING
                    if self.machine.advance(UpgradeMove.READY) is UpgradeState.TAKING and first:
                        self.channel.send({"order": "take"})
                elif event == "taken" and self.machine.advance(UpgradeMove.TAKEN) is UpgradeState.LEFT:
                    self._leave()
                elif event == "failed":
                    self._error = str(message.get("error"))
        except EOFError:
            self._forget_channel()  # its end is known when it is reaped

    def _leave(self) -> None:
        """It is the server now. Our admin process goes first: it would say of the service what is true of our
        workers alone, that they drain."""
        assert self.channel is not None
        logger.info("upgrade: supervisor pid %d has taken over; this one ends with its workers", self._pid)
        self.wake_at_s = inf
        # In this order: the manager listens to the new one from the moment that it has heard of it from us.
        self._supervisor.notifier.tell(f"MAINPID={self._pid}")
        self._supervisor.notifier.muted = True
        self.channel.send({"order": "speak", "roll": self._roll_later})
        self._supervisor.listeners.owns_files = False
        self._supervisor.control.retire()
        self._to_hand_over = True

    def _hand_over(self) -> None:
        """Let our workers finish and leave; whom the new supervisor has no listener of, empties it first."""
        supervisor = self._supervisor
        if supervisor.machine.state is SupervisorState.STOPPING:
            return  # they do already
        while supervisor.slots > self._slots and not supervisor.has_threads:
            supervisor.size.remove()
        supervisor.machine.advance(SupervisorMove.STOP)
        supervisor.forget_plans()
        for child in supervisor.crew.children.values():
            if child.state <= ChildState.READY:
                child.retire("retire", supervisor.last_moment(child))

    def postpones_roll(self) -> bool:
        """Whether a roll has to wait: whoever is the server in the end replaces its workers, once."""
        if self.under_way:
            logger.info("an upgrade is under way: workers are replaced when it is over")
            self._roll_later = True
        return self.machine.state is not UpgradeState.NONE

    def note_death(self, pid: int) -> None:
        """A worker of ours has ended."""
        if self.channel is not None and self.machine.state is UpgradeState.LEFT:
            self.channel.send({"dead": pid})

    def stop(self, *, again: bool) -> None:
        """This supervisor stops, and takes the new one with it unless that one is the server by now."""
        if not self.under_way:
            return
        silent = self.machine.state is UpgradeState.STARTING
        self.machine.advance(UpgradeMove.STOP)
        self.wake_at_s = self._supervisor.last_moment() + _STOP_S
        self._error = self._error or "it was told to stop"
        if silent or self.channel is None or not self.channel.send({"order": "hurry" if again else "stop"}):
            self._kill(signal.SIGTERM)  # nobody hears orders yet

    def quit(self) -> None:
        """The same, at once."""
        if self.under_way:
            self.machine.advance(UpgradeMove.STOP)
            self._kill(signal.SIGQUIT)
            self.wake_at_s = time.monotonic() + _STOP_S

    def keep_time(self, now_s: float) -> None:
        """End one that takes too long; have our workers leave when it is time."""
        if self._to_hand_over and not self._supervisor.control.leaving:
            self._to_hand_over = False
            self._hand_over()
        if self.wake_at_s > now_s:
            return
        if self.machine.state is UpgradeState.ENDING:
            self.wake_at_s = inf
            self._kill(signal.SIGKILL)
        elif self.under_way:
            self._error = f"its workers were not ready within {self.budget_s:g} s"
            self.stop(again=False)

    def reap(self) -> None:
        """See whether the new supervisor has ended."""
        if not self._pid:
            return
        try:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
        except ChildProcessError:
            pid, status = self._pid, 0  # somebody else in this process waits for every child
        if pid != self._pid:
            return
        if self.channel is not None:
            self.hear()  # its last words
        self._pid = 0
        how = describe_exit(os.waitstatus_to_exitcode(status))
        was = self.machine.state
        self.machine.advance(UpgradeMove.GONE)
        self._forget_channel()
        self.wake_at_s = inf
        if was is UpgradeState.LEFT:
            logger.error("supervisor pid %d, which had taken over, has ended: %s", pid, how)
        elif self._supervisor.machine.state < SupervisorState.STOPPING:
            why = f"{self._error} ({how})" if self._error else f"{how}; what it wrote says why"
            logger.error("upgrade failed, supervisor pid %d goes on: %s", os.getpid(), why)
            self._tell_partner(0)
            if self._roll_later:
                self._supervisor.roll_all()

    def _tell_partner(self, slots: int) -> None:
        self._supervisor.crew.scoreboard.tell_server(partner=self._pid if slots else 0, partner_slots=slots)

    def _kill(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, number)

    def _forget_channel(self) -> None:
        if self.channel is not None:
            self._supervisor.selector.unregister(self.channel)
            self.channel.close()
            self.channel = None

    def _leave_in_child(self) -> None:
        """In a forked child: a copy there would hide the end of this process from another supervisor."""
        for channel in (self.channel, self._supervisor.inheritance.channel):
            if channel is not None:
                channel.close()


def _numbers(facts: dict[str, Any]) -> list[int]:
    """All descriptors that the facts name, each once."""
    found = [facts["channel"], *(number for group in facts["groups"] for number in group)]
    for exported in (facts["listeners"], *facts["control"].values()):
        found += [*exported["shared"], *(number for slot in exported["slots"] for number in slot)]
    return sorted({*found})


def _environment(facts: dict[str, Any]) -> dict[str, str]:
    """That of this process, with the words for one pid meant for the child that we are."""
    environment, pid = without_env_files(), str(os.getpid())
    environment.pop("LISTEN_PIDFDID", None)
    for name in ("LISTEN_PID", "WATCHDOG_PID"):
        if environment.get(name) == str(facts["from"]):
            environment[name] = pid
    environment[VARIABLE] = json.dumps({"pid": os.getpid(), **facts})
    return environment


def _start_directory() -> str:
    """Where this process began. The shell's name for it, if it has one: a deployment may let a link point to
    another directory and then ask for an upgrade."""
    here, named = os.getcwd(), os.environ.get("PWD", "")
    with contextlib.suppress(OSError):
        if os.path.samefile(here, named):
            return named
    return here


def _name_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
