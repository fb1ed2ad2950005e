"""The table of the service: a stop is honoured in every state, and nothing leads back from it."""

from __future__ import annotations

from leanserve.supervisor.states import SupervisorMachine, SupervisorMove, SupervisorState
from machines import reachable, walk


def test_every_state_and_every_move() -> None:
    walk(SupervisorMachine, SupervisorState, SupervisorMove)


def test_nothing_leads_back_from_a_stop() -> None:
    ends = {SupervisorState.STOPPING, SupervisorState.STOPPED}
    assert reachable(SupervisorMachine, SupervisorState.STOPPING) <= ends
    assert reachable(SupervisorMachine, SupervisorState.STOPPED) == set()


def test_a_stop_is_possible_in_every_state_but_the_last() -> None:
    for state in SupervisorState:
        machine = SupervisorMachine()
        machine.state = state
        assert machine.accepts(SupervisorMove.STOP) is (state is not SupervisorState.STOPPED)
