"""Where the service is in its life."""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar

from leanserve.machine import Machine

__all__ = ["SupervisorMachine", "SupervisorMove", "SupervisorState", "check_serving"]


class SupervisorState(IntEnum):
    """Where the service is in its life."""

    BOOTING = 0  # no worker has been ready yet
    RUNNING = 1
    ROLLING = 2  # workers are being replaced, one at a time
    STOPPING = 3
    STOPPED = 4


class SupervisorMove(IntEnum):
    """What can happen to it."""

    READY = 0
    ROLL = 1
    ROLLED = 2
    STOP = 3
    ALL_GONE = 4


class SupervisorMachine(Machine[SupervisorState, SupervisorMove]):
    """A stop is honoured in every state, and nothing leads back from it."""

    __slots__ = ()
    START: ClassVar[IntEnum] = SupervisorState.BOOTING
    TABLE: ClassVar = {
        (SupervisorState.BOOTING, SupervisorMove.READY): SupervisorState.RUNNING,
        (SupervisorState.BOOTING, SupervisorMove.STOP): SupervisorState.STOPPING,
        (SupervisorState.RUNNING, SupervisorMove.READY): SupervisorState.RUNNING,
        (SupervisorState.RUNNING, SupervisorMove.ROLL): SupervisorState.ROLLING,
        (SupervisorState.RUNNING, SupervisorMove.STOP): SupervisorState.STOPPING,
        (SupervisorState.ROLLING, SupervisorMove.READY): SupervisorState.ROLLING,
        (SupervisorState.ROLLING, SupervisorMove.ROLL): SupervisorState.ROLLING,
        (SupervisorState.ROLLING, SupervisorMove.ROLLED): SupervisorState.RUNNING,
        (SupervisorState.ROLLING, SupervisorMove.STOP): SupervisorState.STOPPING,
        (SupervisorState.STOPPING, SupervisorMove.READY): SupervisorState.STOPPING,
        (SupervisorState.STOPPING, SupervisorMove.STOP): SupervisorState.STOPPING,
        (SupervisorState.STOPPING, SupervisorMove.ALL_GONE): SupervisorState.STOPPED,
    }


def check_serving(state: SupervisorState) -> None:
    """Whether workers can be told to do anything but to leave. Raises ValueError: why not."""
    if state is SupervisorState.BOOTING:
        raise ValueError("no worker has been ready yet: try again when the first one is")
    if state >= SupervisorState.STOPPING:
        raise ValueError("the server is stopping")
