"""Back-pressure: the one place where a sender waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from leanserve.errors import ClientDisconnected

__all__ = ["WriteGate"]

# What one sender may write in one turn of the event loop: so many bytes, or a sixty-fourth of them in writes.
_TURN_BYTES: Final = 1048576
_WRITE_COST: Final = 16384


# Why a gate is closed, as bits: an IntFlag would cost more than all else that a new connection does here.
_FULL: Final = 1  # the transport is above its high-water mark
_RESTING: Final = 2  # the sender has had its turn
_LOST: Final = 4  # for good


class WriteGate:
    """Closed while the transport holds more unsent bytes than the high-water mark; lost for good at the end.

    ``if not gate.open: await gate.wait_open()`` after each write is all that a sender does. A sender whose
    peer reads as fast as it writes would never wait: others would starve, and the event loop could not even
    tell it that the connection is gone. So the gate also closes behind every so many writes, until the next
    turn of the loop.

    Args:
        call_soon: the loop's; without it senders have no turns.
    """

    __slots__ = ("_call_soon", "_credit", "_shut", "_waiters", "open")

    def __init__(self, call_soon: Callable[[Callable[[], None]], Any] | None = None) -> None:
        self.open = True
        self._shut = 0
        self._credit = _TURN_BYTES
        self._call_soon = call_soon
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def full(self) -> bool:
        """Whether the transport is above its high-water mark: the peer does not read."""
        return bool(self._shut & _FULL)

    @property
    def lost(self) -> bool:
        """Whether the connection is gone."""
        return bool(self._shut & _LOST)

    def spend(self, size_bytes: int) -> None:
        """Count a write."""
        self._credit -= size_bytes + _WRITE_COST
        if self._credit < 0 and self._call_soon is not None:
            self._credit = _TURN_BYTES
            if not self._shut & _RESTING:
                self._close(_RESTING)
                self._call_soon(self._rested)

    def begin_turn(self) -> None:
        """The sender has waited for something else: others have had their turn."""
        self._credit = _TURN_BYTES

    def _rested(self) -> None:
        self._open(_RESTING)

    def pause(self) -> None:
        """The transport is above its high-water mark."""
        self._close(_FULL)

    def resume(self) -> None:
        """The transport is below its low-water mark."""
        self._open(_FULL)

    def lose(self) -> None:
        """The connection is gone: whoever waits, now or later, gets ClientDisconnected."""
        self._close(_LOST)
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

    def watch(self, waiter: asyncio.Future[None]) -> None:
        """Wake `waiter` too when the gate opens or is lost; take it away with :meth:`unwatch`."""
        self._waiters.append(waiter)

    def unwatch(self, waiter: asyncio.Future[None]) -> None:
        """Wake `waiter` no more."""
        if waiter in self._waiters:
            self._waiters.remove(waiter)

    def _close(self, reason: int) -> None:
        self._shut |= reason
        self.open = False

    def _open(self, reason: int) -> None:
        self._shut &= ~reason
        if not self._shut:
            self.open = True
            self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
