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

    Args:
        limit_bytes: above it the inbox says that it is full; it takes messages all the same.
    """

    __slots__ = ("_bytes", "_items", "_limit_bytes", "_news", "_takers", "last")

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._items: deque[tuple[Message, int]] = deque()
        self._news: asyncio.Event | None = None
        self._takers = 0
        #: What is received, again and again, when all else has been.
        self.last: Message | None = None

    @property
    def full(self) -> bool:
        """Whether more is undelivered than the limit allows."""
        return self._bytes > self._limit_bytes

    @property
    def empty(self) -> bool:
        """Whether all messages have been taken."""
        return not self._items

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for the next message."""
        return self._takers > 0 and not self._items

    def put(self, message: Message, size_bytes: int = 0) -> None:
        """Add a message."""
        size_bytes += _MESSAGE_BYTES
        self._bytes += size_bytes
        self._items.append((message, size_bytes))
        self._wake()

    def end(self, message: Message, *, at_once: bool = False) -> None:
        """Say the last word; the first one stands. `at_once` drops what is undelivered."""
        if at_once:
            self._items.clear()
            self._bytes = 0
        if self.last is None:
            self.last = message
        self._wake()

    async def take(self) -> Message:
        """The next message; waits for one."""
        while not self._items:
            if self.last is not None:
                return dict(self.last)
            if self._news is None:
                self._news = asyncio.Event()
            self._news.clear()
            self._takers += 1
            try:
                await self._news.wait()
            finally:
                self._takers -= 1
        message, size_bytes = self._items.popleft()
        self._bytes -= size_bytes
        return message

    def _wake(self) -> None:
        if self._news is not None:
            self._news.set()
