"""The inbox: order, bound, last word."""

from __future__ import annotations

import asyncio

import pytest

from leanserve.asgi.inbox import Inbox
from leanserve.asgi.messages import Message


async def take(inbox: Inbox) -> Message:
    """The next message; waits for one."""
    while (message := inbox.take()) is None:
        await inbox.waiter(asyncio.get_running_loop())
    return message


def test_order_then_the_last_word_for_ever() -> None:
    async def main() -> None:
        inbox = Inbox(100)
        inbox.put({"type": "a"})
        inbox.put({"type": "b"})
        inbox.end({"type": "end", "code": 1})
        inbox.end({"type": "end", "code": 2})
        taken = [await take(inbox) for _ in range(4)]
        assert [m["type"] for m in taken] == ["a", "b", "end", "end"]
        assert taken[3]["code"] == 1
        taken[3]["code"] = 7  # what the application does to its message is not ours
        assert (await take(inbox))["code"] == 1

    asyncio.run(main())


def test_waiting() -> None:
    async def main() -> None:
        inbox = Inbox(100)
        assert not inbox.awaited
        takers = [asyncio.ensure_future(take(inbox)) for _ in range(3)]
        await asyncio.sleep(0)
        assert inbox.awaited
        inbox.put({"type": "a"})
        assert not inbox.awaited
        await asyncio.sleep(0.01)
        assert [t.done() for t in takers].count(True) == 1
        assert inbox.awaited
        inbox.end({"type": "end"})
        assert {(await t)["type"] for t in takers} == {"a", "end"}
        assert not inbox.awaited

    asyncio.run(main())


def test_a_cancelled_wait_loses_nothing() -> None:
    async def main() -> None:
        inbox = Inbox(100)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await take(inbox)
        assert not inbox.awaited
        inbox.put({"type": "a"})
        assert (await take(inbox))["type"] == "a"

    asyncio.run(main())


def test_cancelled_waits_leave_nothing() -> None:
    async def main() -> None:
        inbox = Inbox(100)
        patient = asyncio.ensure_future(take(inbox))
        for _ in range(100):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await take(inbox)
        assert inbox.awaited
        assert len(inbox._waiters) < 4
        inbox.put({"type": "a"})
        assert (await patient)["type"] == "a"

    asyncio.run(main())


def test_full_is_in_bytes_and_empty_messages_count() -> None:
    async def main() -> None:
        inbox = Inbox(10_000)
        inbox.put({}, 9000)
        assert not inbox.full
        inbox.put({}, 2000)
        assert inbox.full
        await take(inbox)
        assert not inbox.full
        for _ in range(100):
            inbox.put({})
        assert inbox.full
        inbox.end({"type": "end"}, at_once=True)
        assert not inbox.full
        assert inbox.empty
        assert (await take(inbox))["type"] == "end"

    asyncio.run(main())
