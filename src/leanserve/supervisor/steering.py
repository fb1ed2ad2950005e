"""Who gets new connections: the listeners of workers that are ready, and workers that have time.

The kernel chooses among the listeners of a port (a BPF program says which), and among the workers that wait
for one of them (worker/wakeups.py). Both have to be told who is there.
"""

from __future__ import annotations

import contextlib
import logging
import socket

from leanserve.bpf import choose_listener
from leanserve.listeners import Listener, Listeners
from leanserve.supervisor.child import Child, ChildState
from leanserve.supervisor.crew import Crew

__all__ = ["Steering"]

logger = logging.getLogger("leanserve")


class Steering:
    """Keeps kernel and workers informed.

    Args:
        listeners: the sockets of all slots.
        crew: the workers.
        backlog: connections that each listener may queue.
        groups: by port, what listens already, in the kernel's order; nothing when nothing does.
    """

    def __init__(
        self, listeners: Listeners, crew: Crew, backlog: int, groups: list[list[socket.socket]]
    ) -> None:
        self._listeners = listeners
        self._crew = crew
        self._backlog = backlog
        # By port, in the kernel's order; None when it will not be steered.
        self._groups: list[list[socket.socket]] | None = groups or [[] for _ in range(listeners.ports)]
        self._aim: list[list[int]] = []

    def let_listen(self, child: Child, slots: int) -> None:
        """A worker is up: all slots begin to listen, one after the other, and it may accept.

        Not only its own: a connection to a slot whose worker still loads its model goes to those who are
        ready.
        """
        begun: set[int] = set()
        for slot in range(slots):
            for port, listener in enumerate(self._listeners.sockets(slot)):
                if not _listens(listener):
                    with contextlib.suppress(OSError):  # the worker meets the same error, and tells it
                        listener.listen(self._backlog)
                        begun.add(slot)
                group = self._groups[port] if self._groups and port < self._listeners.ports else None
                if group is not None and listener not in group and _listens(listener):
                    group.append(listener)
        for other in self._siblings(child):
            for slot in begun:
                if slot not in other.slots:
                    self._watch(other, slot)
        child.channel.send({"order": "open"})

    def introduce(self, child: Child, slots: int) -> None:
        """A process accepts: it waits for the queues of all slots, and its siblings stand behind it in its
        own."""
        for slot in range(slots):
            if child.loops > 1 or slot != child.slot:
                self._watch(child, slot)
        for other in self._siblings(child):
            for slot in child.slots:
                self._watch(other, slot)

    def note_death(self, child: Child) -> None:
        """What its slots have queued is the siblings'."""
        for other in self._siblings(child):
            for slot in child.slots:
                other.channel.send({"look": slot})

    def _siblings(self, child: Child) -> list[Child]:
        ready = (each for each in self._crew.children.values() if each.state is ChildState.READY)
        return [each for each in ready if each.slot != child.slot]

    def _watch(self, child: Child, slot: int) -> None:
        own = [sock.fileno() for sock in self._listeners.sockets(slot)[: self._listeners.ports]]
        if own:
            child.channel.send({"watch": slot}, own)

    def export(self) -> list[list[int]]:
        """The descriptors of what listens, for another supervisor: by port, in the kernel's order."""
        groups = self._groups or []
        for group in groups:
            _settle(group)
        return [[sock.fileno() for sock in group] for group in groups]

    def aim(self, slots: int) -> None:
        """Have the kernel choose among the slots that want connections. Cheap when nothing has changed."""
        if not self._groups or not all(self._groups):
            return
        wanted = [slot for slot in range(slots) if self._wants(slot)] or range(slots)
        aim = []
        for port, group in enumerate(self._groups):
            _settle(group)
            listeners = [self._listeners.sockets(slot)[port] for slot in wanted]
            aim.append([group.index(each) for each in listeners if each in group])
        if aim == self._aim:
            return
        self._aim = aim
        try:
            for group, places in zip(self._groups, aim, strict=True):
                choose_listener(group[0], places)
        except OSError as error:
            logger.warning("new connections are not steered to workers that are ready: %s", error)
            self._groups = None

    def _wants(self, slot: int) -> bool:
        for child in self._crew.in_slot(slot):
            if child.state is ChildState.READY:
                records = self._crew.records(child)
                return not any(each.app_not_ready for each in records if each.slot == slot)
        return False


def _listens(sock: socket.socket) -> bool:
    return sock.fileno() >= 0 and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 0


def _settle(group: list[socket.socket]) -> None:
    """As the kernel does: the last takes the place of one that has ceased to listen."""
    for place in range(len(group) - 1, -1, -1):
        if not _listens(group[place]):
            if not isinstance(group[place], Listener):
                group[place].close()  # of another supervisor's, and known here alone
            last = group.pop()
            if place < len(group):
                group[place] = last
