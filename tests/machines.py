"""One check for all state machines: the full product of states and inputs."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import pytest

from leanserve.errors import IllegalTransition
from leanserve.machine import Machine


def walk(machine: type[Machine[Any, Any]], states: type[IntEnum], moves: type[IntEnum]) -> None:
    """Every state x every input: the table's new state, or IllegalTransition and the old state."""
    for (state, move), target in machine.TABLE.items():
        assert isinstance(state, states)
        assert isinstance(move, moves)
        assert isinstance(target, states)
    for state in states:
        for move in moves:
            it = machine()
            it.state = state
            target = machine.TABLE.get((state, move))
            assert it.accepts(move) is (target is not None)
            if target is not None:
                assert it.advance(move) is target
                assert it.state is target
            else:
                with pytest.raises(IllegalTransition, match=f"{move.name} in state {state.name}"):
                    it.advance(move)
                assert it.state is state


def reachable(
    machine: type[Machine[Any, Any]], start: IntEnum, *, without: IntEnum | None = None
) -> set[IntEnum]:
    """States that can follow `start`, never going through `without`."""
    found: set[IntEnum] = set()
    todo = [start]
    while todo:
        state = todo.pop()
        for (source, _), target in machine.TABLE.items():
            if source == state and target not in found and target != without:
                found.add(target)
                todo.append(target)
    return found
