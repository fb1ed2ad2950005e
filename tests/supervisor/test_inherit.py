"""What a supervisor inherits, and what of it is meant for another process."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
from typing import Any, cast

import pytest

from leanserve.channel import Channel
from leanserve.errors import SettingsError
from leanserve.listeners import Listeners, open_listeners
from leanserve.settings import ListenSettings, Settings
from leanserve.supervisor.child import Child, ChildMove
from leanserve.supervisor.crew import Crew
from leanserve.supervisor.inherit import VARIABLE, Inheritance, describe_addresses
from leanserve.supervisor.signals import SignalQueue
from leanserve.supervisor.steering import Steering

LISTEN = ListenSettings(port=0)


def inherit(**facts: Any) -> tuple[Inheritance, dict[str, str]]:
    environment = {VARIABLE: json.dumps(facts), "OTHER": "1"}
    return Inheritance(cast(Any, None), environment), environment


@pytest.mark.parametrize("text", ["", "{", "[]", "7", json.dumps({"pid": 1, "channel": 0})])
def test_what_is_not_for_this_process(text: str) -> None:
    environment = {VARIABLE: text}
    found = Inheritance(cast(Any, None), environment)
    assert environment == {}
    assert found.owner
    assert found.channel is None
    assert found.order_to_stop(0) == "drain"
    listeners = found.open_listeners(LISTEN, 1)
    assert len(listeners.addresses) == 1
    listeners.close()


def test_until_it_has_taken_over_it_stops_nobody() -> None:
    ours, theirs = Channel.pair()
    before = open_listeners(LISTEN, 2)
    copies = {
        "ports": before.export()["ports"], "shared": [], "files": [],
        "slots": [[os.dup(number) for number in slot] for slot in before.export()["slots"]],
    }  # fmt: skip
    found, environment = inherit(
        pid=os.getpid(), channel=theirs.sock.detach(), addresses=describe_addresses(LISTEN), listeners=copies,
        **{"from": 7},
    )
    assert environment == {"OTHER": "1"}
    assert not found.owner
    assert [found.order_to_stop(slot) for slot in range(3)] == ["retire", "retire", "leave"]
    with pytest.raises(SettingsError, match="an upgrade keeps the addresses"):
        found.open_listeners(ListenSettings(port=1), 1)
    with pytest.raises(SettingsError, match="restart instead"):
        found.open_listeners(ListenSettings(port=0, accept="shared"), 1)
    assert [message["event"] for message in ours.receive()] == ["failed", "failed"]
    listeners = found.open_listeners(LISTEN, 3)
    assert listeners.addresses == before.addresses
    inode = [os.fstat(before.sockets(slot)[0].fileno()).st_ino for slot in range(2)]
    assert [os.fstat(listeners.sockets(slot)[0].fileno()).st_ino for slot in range(2)] == inode
    assert not any(os.get_inheritable(sock.fileno()) for slot in range(3) for sock in listeners.sockets(slot))
    assert listeners.sockets(2)[0].getsockname() == before.sockets(0)[0].getsockname()
    for each in (listeners, before):
        each.close()
    ours.close()
    assert found.channel is not None
    found.channel.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reuseport groups")
@pytest.mark.parametrize("slots", [3, 4])
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_the_order_of_the_listeners_is_that_of_the_kernel(slots: int, wanted: int) -> None:
    """After slots have come and gone; also of those that end later, or of which the new one has none."""

    def begin(listeners: Listeners, groups: list[list[socket.socket]]) -> tuple[Steering, Crew]:
        crew = Crew("app", Settings(), listeners, signals, "stand_ins:main")
        return Steering(listeners, crew, 10, groups), crew

    signals, (ours, theirs) = SignalQueue(), Channel.pair()
    child = Child(7, wanted, 0, 0, theirs, 0.0)
    child.machine.advance(ChildMove.TOLD_READY)
    before = open_listeners(LISTEN, 4)
    old, old_crew = begin(before, [])
    old.let_listen(child, 4)
    leaving = [before.detach_slot(slot)[0] for slot in (2, 3)]
    for slot in (2, 3):
        before.open_slot(slot)
    old.let_listen(child, 4)
    leaving[0].shutdown(socket.SHUT_RDWR)  # the kernel puts the last one in its place
    groups = old.export()
    numbers = {number: os.dup(number) for group in groups for number in group}
    exported = before.export()
    copies = {**exported, "slots": [[numbers[number] for number in slot] for slot in exported["slots"]]}
    found, _ = inherit(
        pid=os.getpid(), channel=os.dup(ours.fileno()), addresses=describe_addresses(LISTEN),
        listeners=copies, groups=[[numbers[number] for number in group] for group in groups],
    )  # fmt: skip
    after = found.open_listeners(LISTEN, slots)
    new, crew = begin(after, found.groups)
    crew.children[child.pid] = child
    new.let_listen(child, slots)
    new.aim(slots)
    assert taken(after, slots) == {wanted}
    leaving[1].shutdown(socket.SHUT_RDWR)
    new.aim(slots)
    assert taken(after, slots) == {wanted}
    left = [sock for group in found.groups for sock in group]
    for each in (before, after, ours, theirs, found.channel, old_crew, crew, *leaving, *left):
        assert each is not None
        each.close()
    signals.close()


def taken(listeners: Listeners, slots: int) -> set[int]:
    """The slots to which the kernel gives some connections."""
    found = set()
    for _ in range(30):
        with socket.create_connection(listeners.sockets(0)[0].getsockname(), 5):
            queues = {listeners.sockets(slot)[0]: slot for slot in range(slots)}
            for sock in select.select(queues, [], [], 0)[0]:
                found.add(queues[sock])
                sock.accept()[0].close()
    return found


def test_a_descriptor_that_is_not_there() -> None:
    ours, theirs = Channel.pair()
    with socket.socket() as sock:
        gone = sock.fileno()
    facts = {"ports": [], "slots": [], "shared": [gone], "files": []}
    found, _ = inherit(
        pid=os.getpid(), channel=theirs.sock.detach(), addresses=describe_addresses(LISTEN), listeners=facts
    )
    with pytest.raises(OSError, match="Bad file descriptor"):
        found.open_listeners(LISTEN, 1)
    assert [message["error"] for message in ours.receive()] == ["[Errno 9] Bad file descriptor"]
    ours.close()
    assert found.channel is not None
    found.channel.close()
