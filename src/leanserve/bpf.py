"""Classic BPF programs on sockets: which new connections the kernel takes, and for which listener. Linux."""

from __future__ import annotations

import socket
import struct
import sys
from array import array
from collections.abc import Sequence
from typing import Final

__all__ = ["choose_listener", "drop_new_connections"]

# asm-generic/socket.h
_SO_ATTACH_FILTER: Final = 26
_SO_ATTACH_REUSEPORT_CBPF: Final = 51

# linux/filter.h: code, jump if true, jump if false, operand
_Instruction = tuple[int, int, int, int]
_LOAD_BYTE, _LOAD_WORD, _MODULO, _IF_EQUAL, _IF_SET, _RETURN = 0x30, 0x20, 0x94, 0x15, 0x45, 0x06
_RANDOM: Final = 0xFFFFF000 + 56  # SKF_AD_OFF + SKF_AD_RANDOM

# On the TCP header: drop what has SYN set, pass the rest.
_TCP_FLAGS, _SYN, _DROP, _PASS = 13, 0x02, 0, 0xFFFFFFFF
_SYN_FILTER: Final = (
    (_LOAD_BYTE, 0, 0, _TCP_FLAGS), (_IF_SET, 0, 1, _SYN), (_RETURN, 0, 0, _DROP), (_RETURN, 0, 0, _PASS),
)  # fmt: skip


def drop_new_connections(listener: socket.socket) -> None:
    """Have the kernel drop SYNs to `listener`; handshakes under way end as they would.

    Raises:
        OSError: that cannot be done here.
    """
    _attach(listener, _SO_ATTACH_FILTER, _SYN_FILTER)


def choose_listener(member: socket.socket, places: Sequence[int]) -> None:
    """Give new connections to some sockets of a SO_REUSEPORT group, each as often as the others.

    Args:
        member: any socket of the group that listens.
        places: the chosen ones, at least one, by their places in the group: sockets come to its end when they
            begin to listen, and when one ceases the last takes its place. Where there is no such place the
            kernel chooses.

    Raises:
        OSError: that cannot be done here.
    """
    program: list[_Instruction] = [(_LOAD_WORD, 0, 0, _RANDOM), (_MODULO, 0, 0, len(places))]
    for number, place in enumerate(places):
        program += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, place)]
    program.append((_RETURN, 0, 0, places[0]))  # never reached; a program has to end
    _attach(member, _SO_ATTACH_REUSEPORT_CBPF, program)


def _attach(sock: socket.socket, option: int, program: Sequence[_Instruction]) -> None:
    if sys.platform != "linux" or sock.family not in (socket.AF_INET, socket.AF_INET6):
        raise OSError("not TCP on Linux")
    code = array("B", b"".join(struct.pack("HBBI", *each) for each in program))
    address, _ = code.buffer_info()
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("HP", len(program), address))
