"""leanserve.transport.phase: the life of a connection, as a table."""

from __future__ import annotations

from leanserve.transport.phase import Phase, PhaseMachine, PhaseMove
from machines import reachable, walk


def test_every_phase_and_every_move() -> None:
    walk(PhaseMachine, Phase, PhaseMove)


def test_nothing_leads_from_last_back_to_idle() -> None:
    assert not reachable(PhaseMachine, Phase.LAST) & {Phase.OPENING, Phase.IDLE, Phase.ACTIVE}


def test_nothing_leads_back_out_of_lingering_and_closed() -> None:
    assert reachable(PhaseMachine, Phase.LINGERING) == {Phase.LINGERING, Phase.CLOSED}
    assert reachable(PhaseMachine, Phase.CLOSED) <= {Phase.CLOSED}


def test_every_phase_can_finish_and_be_lost_once() -> None:
    for phase in Phase:
        assert (phase, PhaseMove.FINISH) in PhaseMachine.TABLE, phase
        if phase is not Phase.CLOSED:
            assert PhaseMachine.TABLE[phase, PhaseMove.LOST] is Phase.CLOSED
    assert (Phase.CLOSED, PhaseMove.LOST) not in PhaseMachine.TABLE


def test_finish_never_leads_to_more_work() -> None:
    targets = {PhaseMachine.TABLE[phase, PhaseMove.FINISH] for phase in Phase}
    assert targets == {Phase.LINGERING, Phase.CLOSED}


def test_order_of_the_phases() -> None:
    """The connection compares phases: what is below TUNNEL speaks HTTP, what is below LINGERING reads."""
    assert [phase for phase in Phase if phase < Phase.TUNNEL] == [
        Phase.OPENING, Phase.IDLE, Phase.ACTIVE, Phase.LAST,
    ]  # fmt: skip
    assert [phase for phase in Phase if phase >= Phase.LINGERING] == [Phase.LINGERING, Phase.CLOSED]
