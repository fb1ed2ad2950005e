"""leanserve.worker.slots: a process alone, and several that share."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Iterator

import pytest

from leanserve.scoreboard import Scoreboard
from leanserve.settings import AdmissionSettings
from leanserve.tokens import Tokens
from leanserve.worker.slots import PoolSlots, Slots, SoleSlots, make_slots
from served import eventually, run


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokens() -> Iterator[Tokens]:
    tokens = Tokens.create(2)
    yield tokens
    tokens.close()


class Share:
    """One worker's share of the tokens, in this process: descriptors and notes of its own."""

    def __init__(self, tokens: Tokens) -> None:
        fds = (os.dup(tokens.fds[0]), os.dup(tokens.fds[1]))
        self.tokens = Tokens(tokens.limit, fds)
        self.held: list[int] = []
        self.slots = PoolSlots(self.tokens, self.held.append)
        self.wakes = 0

    def wake(self) -> None:
        self.wakes += 1


def test_both_kinds_have_it_all() -> None:
    for kind in (SoleSlots, PoolSlots):
        for name, wanted in vars(Slots).items():
            if not name.startswith("_") and callable(wanted):
                there, wanted = inspect.signature(getattr(kind, name)), inspect.signature(wanted)
                assert there.parameters.keys() == wanted.parameters.keys(), name


@pytest.mark.parametrize("pool", [False, True])
def test_counting(pool: bool, tokens: Tokens) -> None:
    slots: Slots = PoolSlots(tokens, lambda _change: None) if pool else SoleSlots(2)
    assert slots.limit == 2
    assert [slots.take(), slots.take(), slots.take()] == [True, True, False]
    assert slots.taken() == 2
    slots.give()
    assert slots.taken() == 1
    assert slots.take()


def test_what_is_held_is_noted_when_it_is_held(tokens: Tokens) -> None:
    share = Share(tokens)
    for _ in range(3):
        share.slots.take()
    share.slots.give()
    assert share.held == [1, 1, -1]
    assert tokens.taken() == 1


def test_noted_after_it_is_taken_and_before_it_is_given_back(tokens: Tokens) -> None:
    """So that a worker killed in between can lose a token, and the limit is never exceeded."""
    seen: list[tuple[int, int]] = []
    slots = PoolSlots(tokens, lambda change: seen.append((change, tokens.taken())))
    slots.take()
    slots.give()
    assert seen == [(1, 1), (-1, 1)]


def test_one_that_is_given_back_wakes_who_watches(loop: str, tokens: Tokens) -> None:
    async def main() -> None:
        one, other = Share(tokens), Share(tokens)
        assert one.slots.take()
        assert one.slots.take()
        other.slots.watch(other.wake)
        other.slots.watch(other.wake)  # again is nothing new
        await asyncio.sleep(0.02)
        assert other.wakes == 0
        one.slots.give()
        await eventually(lambda: other.wakes)
        assert other.slots.take()
        await asyncio.sleep(0)
        before = other.wakes
        await asyncio.sleep(0.05)
        assert other.wakes <= before + 1  # and then it sleeps
        other.slots.unwatch()
        other.slots.unwatch()
        one.slots.give()
        await asyncio.sleep(0.02)
        assert other.wakes <= before + 1

    run(loop, main)


def test_giving_way_is_for_a_moment(loop: str, tokens: Tokens) -> None:
    async def main() -> None:
        share = Share(tokens)
        share.slots.give_way()  # nothing is watched
        share.slots.watch(share.wake)
        share.slots.give_way()
        share.slots.give_way()
        for _ in range(3):
            await asyncio.sleep(0)
        assert share.wakes == 0
        await eventually(lambda: share.wakes)
        share.slots.give_way()
        share.slots.unwatch()  # ends the pause, too
        before = share.wakes
        await asyncio.sleep(0.02)
        assert share.wakes == before

    run(loop, main)


def test_made_for_the_pool_or_for_one_process(tokens: Tokens) -> None:
    settings = AdmissionSettings(max_concurrent_requests=2, max_queue=2)
    alone = make_slots(settings, None, ())
    assert [type(slots) for slots in alone] == [SoleSlots] * 2
    board = Scoreboard.create()
    waiting = Tokens.create(2)
    lane = board.lane(0, 0)
    lane.begin(1, 0)
    slots, places = make_slots(settings, lane, (tokens.fds, waiting.fds))
    slots.take()
    slots.take()
    places.take()
    record = board.read(0, 0)
    assert (record.slots_held, record.places_held) == (2, 1)
    assert (tokens.taken(), waiting.taken()) == (2, 1)
    lane.begin(2, 1)
    record = board.read(0, 0)
    assert (record.slots_held, record.places_held) == (0, 0)
    waiting.close()
    board.close()
