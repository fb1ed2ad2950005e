"""Pings and silence, with time as an argument."""

from __future__ import annotations

from math import inf

import pytest

from leanserve.asgi.heartbeat import Beat, Heartbeat


def beats(beat: Heartbeat, until: float, *, answers: bool, reading: bool = True) -> list[tuple[float, Beat]]:
    """Look whenever a look is due; the peer answers each ping at once, or never."""
    seen = []
    while (now := beat.next_look) <= until:
        due = beat.look(now, reading=reading)
        seen.append((now, due))
        if due is Beat.DEAD:
            break
        if due is Beat.PING and answers:
            beat.silent = False
    return seen


def new(interval: float | None = 20.0, timeout: float | None = 20.0) -> Heartbeat:
    beat = Heartbeat(interval, timeout)
    beat.start(100.0)
    return beat


def test_a_living_peer_is_pinged_at_every_interval() -> None:
    seen = beats(new(20, 5), 200, answers=True)
    assert [now for now, due in seen if due is Beat.PING] == [120, 140, 160, 180, 200]
    assert Beat.DEAD not in [due for _, due in seen]


def test_a_silent_peer_is_dead_a_last_look_after_the_timeout() -> None:
    assert beats(new(20, 5), 200, answers=False)[-1] == (126, Beat.DEAD)


def test_a_timeout_longer_than_the_interval() -> None:
    seen = beats(new(10, 35), 300, answers=False)
    assert [now for now, due in seen if due is Beat.PING] == [110, 120, 130, 140]
    assert seen[-1] == (146, Beat.DEAD)


def test_any_byte_is_life() -> None:
    beat = new(20, 5)
    assert beat.look(120, reading=True) is Beat.PING
    beat.silent = False
    assert beat.look(125, reading=True) is Beat.NOTHING
    assert beat.next_look == 140


def test_what_came_before_the_ping_is_no_answer() -> None:
    beat = new(20, 5)
    beat.silent = False
    assert beat.look(120, reading=True) is Beat.PING
    assert beat.look(125, reading=True) is Beat.NOTHING
    assert beat.look(126, reading=True) is Beat.DEAD


def test_life_at_the_last_look() -> None:
    beat = new(20, 5)
    beat.look(120, reading=True)
    assert beat.look(125, reading=True) is Beat.NOTHING
    beat.silent = False
    assert beat.look(126, reading=True) is Beat.NOTHING


def test_a_loop_that_stood_still_declares_nobody_dead() -> None:
    beat = new(20, 5)
    beat.look(120, reading=True)
    beat.look(125, reading=True)
    assert beat.look(170, reading=True) is not Beat.DEAD  # 44 s late: nothing was read meanwhile
    beat.silent = False
    assert Beat.DEAD not in [due for _, due in beats(beat, 180, answers=True)]


def test_a_stall_before_the_first_look() -> None:
    beat = new(20, 5)
    beat.look(120, reading=True)
    assert beat.look(300, reading=True) is not Beat.DEAD


def test_while_we_do_not_read_silence_says_nothing() -> None:
    seen = beats(new(20, 5), 400, answers=False, reading=False)
    assert Beat.DEAD not in [due for _, due in seen]


@pytest.mark.parametrize("off", [None, 0.0])
def test_switched_off(off: float | None) -> None:
    assert new(off, 5).next_look == inf
    assert new(off, off).next_look == inf
    seen = beats(new(20, off), 500, answers=False)
    assert {due for _, due in seen} == {Beat.PING}


def test_nothing_before_the_start() -> None:
    assert Heartbeat(20, 20).next_look == inf
