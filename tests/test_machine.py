"""leanserve.machine: the form that all state machines have."""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar

import pytest

from leanserve.errors import IllegalTransition
from leanserve.machine import Machine
from machines import reachable, walk


class Door(IntEnum):
    SHUT = 0
    OPEN = 1


class Push(IntEnum):
    PUSH = 0
    PULL = 1


class DoorMachine(Machine[Door, Push]):
    __slots__ = ()
    START: ClassVar[IntEnum] = Door.SHUT
    TABLE: ClassVar = {(Door.SHUT, Push.PULL): Door.OPEN, (Door.OPEN, Push.PUSH): Door.SHUT}


def test_it_starts_and_advances() -> None:
    door = DoorMachine()
    assert door.state is Door.SHUT
    assert door.advance(Push.PULL) is Door.OPEN
    assert repr(door) == "<DoorMachine OPEN>"


def test_the_whole_product() -> None:
    walk(DoorMachine, Door, Push)


def test_an_illegal_move_names_itself_and_changes_nothing() -> None:
    door = DoorMachine()
    with pytest.raises(IllegalTransition, match="DoorMachine: PUSH in state SHUT"):
        door.advance(Push.PUSH)
    assert door.state is Door.SHUT


def test_it_takes_no_other_attribute() -> None:
    with pytest.raises(AttributeError):
        DoorMachine().note = 1  # type: ignore[attr-defined]


def test_reachable_follows_the_table() -> None:
    assert reachable(DoorMachine, Door.SHUT) == {Door.OPEN, Door.SHUT}
    assert reachable(DoorMachine, Door.SHUT, without=Door.OPEN) == set()
