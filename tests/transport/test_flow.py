"""The write gate: why it is closed, who waits, and that a sender has turns."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import pytest

from leanserve.errors import ClientDisconnected
from leanserve.transport.flow import WriteGate


def test_open_is_the_absence_of_every_reason() -> None:
    later: list[Callable[[], None]] = []
    gate = WriteGate(later.append)
    moves = {
        "pause": gate.pause,
        "resume": gate.resume,
        "rest": lambda: [gate.spend(1 << 22), gate.spend(1 << 22)],
        "rested": lambda: [later.pop()() for _ in later[:1]],
    }
    for steps in itertools.product(moves, repeat=4):
        gate.resume()
        for callback in later:
            callback()
        later.clear()
        assert gate.open
        full = resting = False
        for step in steps:
            moves[step]()
            full = step == "pause" or (full and step != "resume")
            resting = step == "rest" or (resting and step != "rested")
            assert gate.full is full, steps
            assert gate.open is not (full or resting), steps


def test_lost_is_for_good() -> None:
    async def main() -> None:
        gate = WriteGate(asyncio.get_running_loop().call_soon)
        gate.pause()
        waiting = [asyncio.ensure_future(gate.wait_open()) for _ in range(3)]
        await asyncio.sleep(0)
        gate.lose()
        for waiter in waiting:
            with pytest.raises(ClientDisconnected):
                await waiter
        gate.resume()
        assert gate.lost
        assert not gate.open
        with pytest.raises(ClientDisconnected):
            await gate.wait_open()

    asyncio.run(main())


def test_waiters_wake_when_the_last_reason_is_gone() -> None:
    async def main() -> None:
        gate = WriteGate(asyncio.get_running_loop().call_soon)
        gate.pause()
        gate.spend(1 << 22)
        gate.spend(1 << 22)
        waiting = asyncio.ensure_future(gate.wait_open())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        gate.resume()
        await waiting

    asyncio.run(main())


@pytest.mark.parametrize("size", [1, 20, 65536, 1 << 20])
def test_a_sender_that_never_has_to_wait_lets_others_run(size: int) -> None:
    async def main() -> None:
        gate = WriteGate(asyncio.get_running_loop().call_soon)
        writes = 0

        async def send() -> None:
            nonlocal writes
            while True:
                gate.spend(size)
                writes += 1
                if not gate.open:
                    await gate.wait_open()

        sender = asyncio.ensure_future(send())
        for turn in range(2, 12):
            await asyncio.sleep(0)
            assert writes <= turn * 66
            assert writes * size <= turn * (4194304 + 2 * size)
        assert writes >= 5
        sender.cancel()

    asyncio.run(main())


def test_without_a_loop_there_are_no_turns() -> None:
    gate = WriteGate()
    gate.spend(1 << 30)
    assert gate.open


def test_a_sender_that_gives_way_of_itself_is_never_kept_waiting() -> None:
    async def main() -> None:
        gate = WriteGate(asyncio.get_running_loop().call_soon)
        for _ in range(1000):
            gate.spend(20)
            assert gate.open
            await asyncio.sleep(0)

    asyncio.run(main())


def test_half_a_turn_is_free() -> None:
    later: list[Callable[[], None]] = []
    gate = WriteGate(later.append)
    for _ in range(2 * 33 - 1):
        gate.spend(20)
        assert gate.open
    gate.spend(20)
    assert not gate.open
    assert len(later) == 1
    later.pop()()
    assert gate.open
