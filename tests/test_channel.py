"""The channel between supervisor and worker: whole messages, in pieces, at the end, and garbage."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from leanserve.channel import Channel

Ends = tuple[Channel, Channel]


@pytest.fixture
def ends() -> Iterator[Ends]:
    ours, theirs = Channel.pair()
    yield ours, theirs
    ours.close()
    theirs.close()


def test_messages_both_ways(ends: Ends) -> None:
    ours, theirs = ends
    assert theirs.send({"event": "ready", "seconds": 1.25})
    assert theirs.send({"event": "full"})
    assert list(ours.receive()) == [{"event": "ready", "seconds": 1.25}, {"event": "full"}]
    assert list(ours.receive()) == []
    assert ours.send({"order": "drain"})
    assert list(theirs.receive()) == [{"order": "drain"}]


@pytest.mark.parametrize("text", ["", "two\nlines", "ünïcode \u2028 \udce4", "\0", "x" * 100_000])
def test_any_text_in_one_message(ends: Ends, text: str) -> None:
    ours, theirs = ends
    assert theirs.send({"error": text})
    assert list(ours.receive()) == [{"error": text}]


def test_every_cut(ends: Ends) -> None:
    ours, theirs = ends
    messages: list[dict[str, Any]] = [{"a": 1}, {"b": "\n"}, {"c": [1, 2]}]
    data = b"".join(json.dumps(message).encode() + b"\n" for message in messages)
    for cut in range(len(data) + 1):
        theirs.sock.send(data[:cut])
        first = list(ours.receive())
        assert len(first) == data[:cut].count(b"\n")
        theirs.sock.send(data[cut:])
        assert first + list(ours.receive()) == messages


def test_the_end(ends: Ends) -> None:
    """What was sent before the end is still read."""
    ours, theirs = ends
    theirs.send({"event": "failed"})
    theirs.close()
    messages = ours.receive()
    assert next(messages) == {"event": "failed"}
    with pytest.raises(EOFError):
        next(messages)
    with pytest.raises(EOFError):
        next(ours.receive())
    assert ours.send({"order": "drain"}) is False


def test_half_a_message_at_the_end_is_none(ends: Ends) -> None:
    ours, theirs = ends
    theirs.sock.send(b'{"event": "re')
    theirs.close()
    with pytest.raises(EOFError):
        next(ours.receive())


@pytest.mark.parametrize(
    "garbage",
    [
        b"\n", b"hello\n", b"[1]\n", b'"text"\n', b"12\n", b"null\n", b"\xff\xfe\n", b"{\n",
        b"[" * 50_000 + b"\n",
    ],
)
def test_garbage_is_an_end(ends: Ends, garbage: bytes) -> None:
    """An application may write to a descriptor that is not its own: no other error may come of it."""
    ours, theirs = ends
    theirs.sock.send(garbage)
    with pytest.raises(EOFError):
        list(ours.receive())


def test_a_line_without_end_is_bounded(ends: Ends) -> None:
    ours, theirs = ends

    def endless() -> None:
        for _ in range(100):
            theirs.sock.send(b"x" * 65536)
            list(ours.receive())

    with pytest.raises(EOFError):
        endless()


def test_a_full_pipe_does_not_block(ends: Ends) -> None:
    ours, _theirs = ends
    sent = [ours.send({"order": "x" * 10_000}) for _ in range(200)]
    assert not sent[-1]


def test_a_closed_end_is_no_error_for_who_writes(ends: Ends) -> None:
    ours, theirs = ends
    ours.close()
    assert ours.send({}) is False
    with pytest.raises(EOFError):
        next(theirs.receive())


def test_the_ends_are_not_for_other_programs(ends: Ends) -> None:
    for end in ends:
        assert not os.get_inheritable(end.fileno())
        assert end.sock.family == socket.AF_UNIX
        assert not end.sock.getblocking()
