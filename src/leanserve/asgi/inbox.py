"""Messages on their way to the application."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from leanserve.asgi.messages import Message

__all__ = ["Inbox"]

# What a message costs besides its payload: else a flood of empty messages would be free.
_MESSAGE_BYTES: Final = 256


class Inbox:
    """What the application has not received yet, and the last word when that is out.

    A taker calls :meth:`take` until there is something, and awaits a :meth:`waiter` in between.

    Args:
        limit_bytes: above it the inbox is full; it takes messages all the same.
    """

    __slots__ = ("_bytes", "_items", "_limit_bytes", "_waiters", "full", "last")

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._items: deque[tuple[Message, int]] = deque()
        self._waiters: list[asyncio.Future[None]] = []
        #: Whether more is undelivered than the limit allows, but for a message that somebody waits for.
        self.full = False
        #: What is received, again and again, when all else has been.
        self.last: Message | None = None

    @property
    def empty(self) -> bool:
        """Whether all messages have been taken."""
        return not self._items

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for the next message."""
        return not self._items and not all(waiter.done() for waiter in self._waiters)

    def put(self, message: Message, size_bytes: int = 0) -> None:
        """Add a message."""
        size_bytes += _MESSAGE_BYTES
        self._bytes += size_bytes
        self._items.append((message, size_bytes))
        # Who waits takes it in the next turn of the loop: not to read until then costs more than it saves.
        self.full = not (self._waiters and self._wake()) and self._bytes > self._limit_bytes

    def end(self, message: Message, *, at_once: bool = False) -> None:
        """Say the last word; the first one stands. `at_once` drops what is undelivered."""
        if at_once:
            self._items.clear()
            self._bytes = 0
            self.full = False
        if self.last is None:
            self.last = message
        self._wake()

    def take(self) -> Message | None:
        """The next message, or the last word; None while there is neither."""
        if not self._items:
            return None if self.last is None else dict(self.last)
        message, size_bytes = self._items.popleft()
        self._bytes -= size_bytes
        self.full = self._bytes > self._limit_bytes
        return message

    def waiter(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """Done when it makes sense to try again. For one taker each: cancelling the taker cancels it."""
        if self._waiters:
            self._waiters = [waiter for waiter in self._waiters if not waiter.done()]
        waiter = loop.create_future()
        self._waiters.append(waiter)
        return waiter

    def _wake(self) -> bool:
        woken = False
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
                woken = True
        self._waiters.clear()
        return woken
