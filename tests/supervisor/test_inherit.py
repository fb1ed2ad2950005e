"""What a supervisor inherits, and what of it is meant for another process."""

from __future__ import annotations

import json
import os
import socket
from typing import Any, cast

import pytest

from leanserve.channel import Channel
from leanserve.errors import SettingsError
from leanserve.listeners import open_listeners
from leanserve.settings import ListenSettings
from leanserve.supervisor.inherit import VARIABLE, Inheritance, describe_addresses

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
