"""The new supervisor's side of an upgrade: what it inherits, and from when on it is the server.

Until it has taken over, the listeners belong to the supervisor that started it: nothing that happens here may
stop them listening, remove a socket file, or speak for the service.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import socket
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from leanserve.addresses import parse_addresses
from leanserve.channel import Channel
from leanserve.errors import SettingsError
from leanserve.listeners import Listeners, open_listeners
from leanserve.settings import ListenSettings
from leanserve.supervisor.states import SupervisorState

if TYPE_CHECKING:
    from leanserve.supervisor.supervisor import Supervisor

__all__ = ["VARIABLE", "Inheritance", "describe_addresses"]

logger = logging.getLogger("leanserve")

#: JSON: the pid that is meant, the descriptor of the channel, and what was exported.
VARIABLE = "LEANSERVE_UPGRADE"


def describe_addresses(listen: ListenSettings) -> list[str]:
    """What has to be the same in both supervisors, in words."""
    how = "one listener for all" if listen.accept == "shared" else "a listener per worker"
    return [*sorted(map(str, parse_addresses(listen))), how]


class Inheritance:
    """What another supervisor has left to this one; nothing, when it was started by somebody else.

    Args:
        supervisor: whose inheritance it is.
        environment: where it says so; the variable is taken out.

    Attributes:
        owner: the listeners are this supervisor's.
        control: what the other one's ``Control`` has exported.
        groups: by port, what listened when this process was started, in the kernel's order.
    """

    def __init__(self, supervisor: Supervisor, environment: MutableMapping[str, str]) -> None:
        self._supervisor = supervisor
        facts = _read(environment.pop(VARIABLE, ""))
        self.owner = not facts
        self.control: Mapping[str, Any] = facts.get("control", {})
        self.groups: list[list[socket.socket]] = []
        self._facts = facts
        self._former_pid: int = facts.get("from", 0)
        self.channel: Channel | None = None
        if facts:
            os.set_inheritable(facts["channel"], False)
            self.channel = Channel(socket.socket(fileno=facts["channel"]))
            self.channel.sock.setblocking(False)

    def __repr__(self) -> str:
        return f"<Inheritance {'taken' if self.owner else f'of {self._former_pid}'}>"

    @property
    def shared_slots(self) -> int:
        """How many slots the other supervisor has listeners of."""
        return len(self._facts["listeners"]["slots"]) if self._facts else 0

    def open_listeners(self, listen: ListenSettings, slots: int) -> Listeners:
        """The inherited sockets, and new ones for more slots; without an inheritance all are new.

        Raises:
            SettingsError: the addresses are not those of the other supervisor, or cannot be used.
            OSError: the kernel refused.
        """
        if not self._facts:
            return open_listeners(listen, slots)
        try:
            before, now = self._facts["addresses"], describe_addresses(listen)
            if before != now:
                raise SettingsError(
                    f"an upgrade keeps the addresses ({', '.join(before)}) and cannot change them to "
                    f"{', '.join(now)}: restart instead"
                )
            strangers = self._take_strangers(slots)
            listeners = open_listeners(listen, slots, self._facts["listeners"])
        except (SettingsError, OSError) as error:
            self.tell_failure(str(error))
            raise
        ours = {sock.fileno(): sock for slot in range(slots) for sock in listeners.sockets(slot)}
        groups = self._facts.get("groups", [])
        self.groups = [[strangers.get(number) or ours[number] for number in group] for group in groups]
        return listeners

    def _take_strangers(self, slots: int) -> dict[int, socket.socket]:
        """Sockets that listen and will be none of ours, by their numbers here: as long as they do, they have
        their places among the others."""
        exported = self._facts["listeners"]["slots"]
        ours = {number for slot in exported[:slots] for number in slot}
        others = {number for slot in exported[slots:] for number in slot}  # of these a copy: they are closed
        found = {}
        for number in {number for group in self._facts.get("groups", []) for number in group} - ours:
            os.set_inheritable(number, False)
            found[number] = socket.socket(fileno=os.dup(number) if number in others else number)
        return found

    def begin(self) -> None:
        """Say that this process hears orders, or that it is the server from its beginning."""
        if self.channel is None:
            self._supervisor.control.open(self._supervisor.selector)
        else:
            supervisor = self._supervisor
            supervisor.selector.register(self.channel, selectors.EVENT_READ, self)
            supervisor.notifier.muted = True
            shared = min(supervisor.slots, self.shared_slots)
            supervisor.crew.scoreboard.tell_server(partner=self._former_pid, partner_slots=shared)
            self.channel.send({"event": "hello", "slots": supervisor.slots})
            logger.info("upgrade: to take over from supervisor pid %d", self._former_pid)

    def tell_failure(self, error: str) -> None:
        """Why this supervisor will end; it goes to the log of the other one."""
        if self.channel is not None and not self.owner:
            self.channel.send({"event": "failed", "error": error})

    def note_ready(self) -> None:
        """A worker is ready; when each slot has one, the other supervisor may leave."""
        crew, slots = self._supervisor.crew, range(self._supervisor.slots)
        if not self.owner and all(any(each.booted for each in crew.serving(slot)) for slot in slots):
            self._say("ready")

    def order_to_stop(self, slot: int) -> str:
        """What a worker is told when this supervisor stops: of the channel's orders the one that lets the
        listeners of the other supervisor listen on."""
        if self.owner:
            return "drain"
        return "retire" if slot < self.shared_slots else "leave"

    def hear(self) -> None:
        """Something came from the other supervisor."""
        if self.channel is None:
            return
        try:
            for message in self.channel.receive():
                self._obey(message)
        except EOFError:
            self._supervisor.selector.unregister(self.channel)
            self.channel.close()
            self.channel = None
            self._supervisor.notifier.muted = False
            if not self.owner and self._supervisor.machine.state < SupervisorState.STOPPING:
                logger.warning("upgrade: supervisor pid %d has died", self._former_pid)
                self._take()

    def _obey(self, message: Mapping[str, Any]) -> None:
        order = message.get("order")
        if order == "take":
            self._take()
            self._say("taken")
        elif order == "speak":
            self._supervisor.notifier.muted = False
            if message.get("roll"):
                self._supervisor.roll_all()  # SIGHUP came while both were there
        elif order in ("stop", "hurry"):
            stops = self._supervisor.machine.state is SupervisorState.STOPPING
            if order == "hurry" or not stops:
                self._supervisor.stop()
            if order == "hurry" and not stops:
                self._supervisor.stop()
        elif "dead" in message:
            self._supervisor.control.note_death(int(message["dead"]))

    def _take(self) -> None:
        self.owner = True
        self._supervisor.crew.scoreboard.tell_server(partner=0)
        self._supervisor.listeners.owns_files = True
        self._supervisor.aim()  # before the other one sends workers away, and does so no more
        logger.info("upgrade: taken over from supervisor pid %d", self._former_pid)
        self._supervisor.control.open(self._supervisor.selector)

    def _say(self, event: str) -> None:
        if self.channel is not None:
            self.channel.send({"event": event})


def _read(text: str) -> dict[str, Any]:
    """The facts, when they are meant for this process: a child of it may find them in its environment."""
    with contextlib.suppress(ValueError):
        facts = json.loads(text)
        if isinstance(facts, dict) and facts.get("pid") == os.getpid():
            return facts
    return {}
