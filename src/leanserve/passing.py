"""Worker specs and answers on the socket between the supervisor and a template process.

One packet each, kept whole by the kernel (SOCK_SEQPACKET). Facts are pickled, and sockets come behind them as
descriptors. Other descriptors in a spec are those that the template has inherited, under the same numbers.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

from leanserve.channel import Channel, WorkerSpec
from leanserve.errors import SettingsError
from leanserve.listeners import Listener

__all__ = ["PACKET_BYTES", "receive_packet", "receive_spec", "send_packet", "send_spec"]

#: Of facts, or of an answer; what a socket takes by default is a little more.
PACKET_BYTES = 1 << 17
# Linux passes no more than 253 descriptors at once.
_BATCH = 250


def send_packet(sock: socket.socket, message: dict[str, Any]) -> None:
    """Send one message. Raises OSError."""
    sock.send(json.dumps(message).encode())


def receive_packet(sock: socket.socket) -> dict[str, Any] | None:
    """The next message, or None at the end. Raises OSError (BlockingIOError, TimeoutError)."""
    data = sock.recv(PACKET_BYTES)
    message: dict[str, Any] | None = json.loads(data) if data else None
    return message


def send_spec(sock: socket.socket, spec: WorkerSpec) -> None:
    """Send what :func:`receive_spec` reads.

    Raises:
        OSError: it cannot be sent.
        SettingsError: a setting cannot be told to another process.
    """
    import pickle  # for those who preload

    # Listeners that all slots share are in the list of each.
    numbers = {each.fileno(): None for slot in spec.listeners for each in slot}
    places = {number: place for place, number in enumerate(numbers)}
    slots = [[places[each.fileno()] for each in slot] for slot in spec.listeners]
    try:
        data = pickle.dumps({**spec.facts(), "listeners": slots})
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SettingsError(f"preload needs names, not objects: {error}") from error
    sock.send(data)
    passed = [spec.channel.fileno(), *numbers]
    for start in range(0, len(passed), _BATCH):
        socket.send_fds(sock, [b"."], passed[start : start + _BATCH])


def receive_spec(sock: socket.socket) -> WorkerSpec | None:
    """The next spec, or None at the end; its sockets are the caller's to close. Raises OSError."""
    import pickle

    data = sock.recv(PACKET_BYTES)
    if not data:
        return None
    facts: dict[str, Any] = pickle.loads(data)
    slots: list[list[int]] = facts.pop("listeners")
    count = 1 + max((place + 1 for slot in slots for place in slot), default=0)
    numbers: list[int] = []
    while len(numbers) < count:
        mark, passed, _, _ = socket.recv_fds(sock, 1, _BATCH)
        if not mark:
            return None
        numbers += passed
    for number in numbers:
        os.set_inheritable(number, False)
    channel = Channel(socket.socket(fileno=numbers[0]))
    found: list[socket.socket] = [Listener(fileno=number) for number in numbers[1:]]
    listeners = [[found[place] for place in slot] for slot in slots]
    return WorkerSpec(channel=channel, listeners=listeners, **facts)
