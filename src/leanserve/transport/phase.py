"""The life of a connection as a table."""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar

from leanserve.machine import Machine

__all__ = ["Phase", "PhaseMachine", "PhaseMove", "Wait"]


class Phase(IntEnum):
    """Where a connection is in its life."""

    OPENING = 0  # accepted, no request yet
    IDLE = 1  # between two exchanges
    ACTIVE = 2  # an exchange runs, another may follow
    LAST = 3  # an exchange runs, and the connection closes behind it
    TUNNEL = 4  # the bytes are another protocol's (WebSocket)
    LINGERING = 5  # our side is closed; input is read and dropped until EOF or a deadline
    CLOSED = 6


class PhaseMove(IntEnum):
    """What can happen to a connection."""

    REQUEST = 0
    LAST_REQUEST = 1
    NO_MORE = 2
    DONE = 3
    UPGRADE = 4
    FINISH = 5
    LOST = 6


class PhaseMachine(Machine[Phase, PhaseMove]):
    """Two deadlines in a row close any connection, and nothing leads from LAST back to IDLE."""

    __slots__ = ()
    START: ClassVar[IntEnum] = Phase.OPENING
    TABLE: ClassVar = {
        (Phase.OPENING, PhaseMove.REQUEST): Phase.ACTIVE,
        (Phase.OPENING, PhaseMove.LAST_REQUEST): Phase.LAST,
        (Phase.OPENING, PhaseMove.FINISH): Phase.LINGERING,
        (Phase.OPENING, PhaseMove.LOST): Phase.CLOSED,
        (Phase.IDLE, PhaseMove.REQUEST): Phase.ACTIVE,
        (Phase.IDLE, PhaseMove.LAST_REQUEST): Phase.LAST,
        (Phase.IDLE, PhaseMove.FINISH): Phase.LINGERING,
        (Phase.IDLE, PhaseMove.LOST): Phase.CLOSED,
        (Phase.ACTIVE, PhaseMove.NO_MORE): Phase.LAST,
        (Phase.ACTIVE, PhaseMove.DONE): Phase.IDLE,
        (Phase.ACTIVE, PhaseMove.UPGRADE): Phase.TUNNEL,
        (Phase.ACTIVE, PhaseMove.FINISH): Phase.LINGERING,
        (Phase.ACTIVE, PhaseMove.LOST): Phase.CLOSED,
        (Phase.LAST, PhaseMove.NO_MORE): Phase.LAST,
        (Phase.LAST, PhaseMove.UPGRADE): Phase.TUNNEL,
        (Phase.LAST, PhaseMove.FINISH): Phase.LINGERING,
        (Phase.LAST, PhaseMove.LOST): Phase.CLOSED,
        (Phase.TUNNEL, PhaseMove.FINISH): Phase.LINGERING,
        (Phase.TUNNEL, PhaseMove.LOST): Phase.CLOSED,
        (Phase.LINGERING, PhaseMove.FINISH): Phase.LINGERING,
        (Phase.LINGERING, PhaseMove.LOST): Phase.CLOSED,
        (Phase.CLOSED, PhaseMove.FINISH): Phase.CLOSED,
    }


class Wait(IntEnum):
    """What the deadline of a connection is for."""

    FIRST_BYTE = 0
    HEAD = 1
    NEXT_REQUEST = 2
    BODY = 3
    REST_OF_BODY = 4
    PROBE = 5
    LINGER = 6
    TUNNEL = 7
