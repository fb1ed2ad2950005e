"""Back-pressure: the one place where a sender waits."""

from __future__ import annotations

import asyncio

from leanserve.errors import ClientDisconnected

__all__ = ["WriteGate"]


class WriteGate:
    """Closed while the transport holds more unsent bytes than the high-water mark; lost for good at the end.

    ``if not gate.open: await gate.wait_open()`` after each write is all that a sender does.
    """

    __slots__ = ("_waiters", "lost", "open")

    def __init__(self) -> None:
        self.open = True
        self.lost = False
        self._waiters: list[asyncio.Future[None]] = []

    def pause(self) -> None:
        """The transport is above its high-water mark."""
        self.open = False

    def resume(self) -> None:
        """The transport is below its low-water mark."""
        self.open = True
        self._wake()

    def lose(self) -> None:
        """The connection is gone: whoever waits, now or later, gets ClientDisconnected."""
        self.lost = True
        self.open = False
        self._wake()

    async def wait_open(self) -> None:
        """Wait until writing makes sense again.

        Raises:
            ClientDisconnected: the connection is gone.
        """
        while not self.open:
            if self.lost:
                raise ClientDisconnected("the client has gone")
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
