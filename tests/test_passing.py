"""leanserve.passing: a spec arrives as it was sent, with sockets that are the same."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from leanserve.channel import Channel, WorkerSpec
from leanserve.errors import SettingsError
from leanserve.passing import receive_packet, receive_spec, send_packet, send_spec
from leanserve.settings import Settings


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ends
    for end in ends:
        end.close()


def identity(sock: socket.socket) -> tuple[int, int]:
    facts = os.fstat(sock.fileno())
    return facts.st_dev, facts.st_ino


def bare_spec(settings: Settings, channel: Channel) -> WorkerSpec:
    return WorkerSpec(
        app="a:b", settings=settings, slot=0, generation=0, listeners=[[]], channel=channel
    )


@pytest.mark.parametrize("slots", [1, 3, 300])
def test_there_it_is(pair: tuple[socket.socket, socket.socket], slots: int) -> None:
    shared = socket.socket()
    own = [socket.socket() for _ in range(slots)]
    ours, theirs = Channel.pair()
    spec = WorkerSpec(
        app="a:b", settings=Settings.build(workers=slots), slot=slots - 1, generation=7, channel=theirs,
        listeners=[[sock, shared] for sock in own], shared=1, scoreboard_fd=5, tokens=((1, 2), (3, 4)),
        lane=1, parent_pid=4711, born_s=1.5, loops=2,
    )
    send_spec(pair[0], spec)
    found = receive_spec(pair[1])
    assert found is not None
    assert found.facts() == spec.facts()
    assert [[identity(sock) for sock in slot] for slot in found.listeners] == [
        [identity(sock), identity(shared)] for sock in own
    ]
    copies = {sock for slot in found.listeners for sock in slot}
    assert len(copies) == slots + 1
    assert not any(sock.get_inheritable() for sock in copies)
    assert not found.channel.sock.get_inheritable()
    found.channel.send({"event": "ready"})
    assert list(ours.receive()) == [{"event": "ready"}]
    for sock in {shared, *own, ours.sock, theirs.sock, found.channel.sock, *copies}:
        sock.close()


def test_without_listeners(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = Channel.pair()
    send_spec(pair[0], bare_spec(Settings(), theirs))
    found = receive_spec(pair[1])
    assert found is not None
    assert found.listeners == [[]]
    for channel in (ours, theirs, found.channel):
        channel.close()


def test_the_end(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].close()
    assert receive_spec(pair[1]) is None
    assert receive_packet(pair[1]) is None


def test_packets_are_whole(pair: tuple[socket.socket, socket.socket]) -> None:
    long = {"trace": "x" * 100_000}
    send_packet(pair[0], {"pid": 1})
    send_packet(pair[0], long)
    assert receive_packet(pair[1]) == {"pid": 1}
    assert receive_packet(pair[1]) == long


def test_what_cannot_be_told(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = Channel.pair()
    settings = Settings.build(ssl_context_factory=lambda: None)
    with pytest.raises(SettingsError, match="preload needs names, not objects"):
        send_spec(pair[0], bare_spec(settings, theirs))
    pair[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        pair[1].recv(1)
    for channel in (ours, theirs):
        channel.close()
