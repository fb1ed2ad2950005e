"""Back-pressure: the one place where a sender waits, and how long a peer may keep it waiting."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from leanserve.errors import ClientDisconnected, RemoteProtocolError
from leanserve.transport.deadlines import NEVER

if TYPE_CHECKING:
    from leanserve.transport.closing import ClosingConnection

__all__ = ["WRITE_SHIFT", "ReaderWatch", "WriteGate"]

try:
    from fcntl import ioctl
    from termios import TIOCOUTQ as _TIOCOUTQ
except ImportError:  # Windows
    _TIOCOUTQ = None  # type: ignore[assignment,misc]

# What one sender may write in half a turn of the event loop, where a write is one and so are 2 to the power
# of these bytes; they take about equally long. Numbers so small that CPython need not make them.
_HALF_TURN: Final = 32
WRITE_SHIFT: Final = 16


# Why a gate is closed, as bits: an IntFlag would cost more than all else that a new connection does here.
_FULL: Final = 1  # the transport is above its high-water mark
_RESTING: Final = 2  # the sender has had its turn
_LOST: Final = 4  # for good


class WriteGate:
    """Closed while the transport holds more unsent bytes than the high-water mark; lost for good at the end.

    ``if not gate.open: await gate.wait_open()`` after each write is all that a sender does. A sender whose
    peer reads as fast as it writes would never wait: others would starve, and the event loop could not even
    tell it that the connection is gone. So the gate also closes behind every so many writes, until the next
    turn of the loop; but for a sender that lets the loop turn of itself.

    Args:
        call_soon: the loop's; without it senders have no turns.
    """

    __slots__ = ("_asked", "_call_soon", "_shut", "_waiters", "credit", "open")

    def __init__(self, call_soon: Callable[[Callable[[], None]], Any] | None = None) -> None:
        self.open = True
        self._shut = 0
        #: Writes until :meth:`rest` has to be called.
        self.credit = _HALF_TURN
        self._asked = False
        self._call_soon = call_soon
        self._waiters: list[asyncio.Future[None]] | None = None

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
        self.credit -= 1 + (size_bytes >> WRITE_SHIFT)
        if self.credit < 0:
            self.rest()

    def rest(self) -> None:
        """The credit is used up: behind the first half the loop is asked for a turn, behind the second it is
        waited for."""
        if self._call_soon is None:
            return
        self.credit = _HALF_TURN
        if self._asked:
            self._close(_RESTING)
        else:
            self._asked = True
            self._call_soon(self._turned)

    def _turned(self) -> None:
        self.credit = _HALF_TURN
        self._asked = False
        if self._shut & _RESTING:
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
            if self._shut == _RESTING:
                await asyncio.sleep(0)  # a turn is all there is to wait for, and takes no future
            else:
                await self._waiter()

    async def wait_lost(self) -> None:
        """Wait until it is told that the connection is gone."""
        while not self.lost:
            await self._waiter()

    def _waiter(self) -> asyncio.Future[None]:
        waiter = asyncio.get_running_loop().create_future()
        self.watch(waiter)
        return waiter

    def watch(self, waiter: asyncio.Future[None]) -> None:
        """Wake `waiter` too when the gate opens or is lost; take it away with :meth:`unwatch`."""
        if self._waiters is None:
            self._waiters = []
        self._waiters.append(waiter)

    def unwatch(self, waiter: asyncio.Future[None]) -> None:
        """Wake `waiter` no more."""
        if self._waiters is not None and waiter in self._waiters:
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
        if self._waiters is not None:
            waiters, self._waiters = self._waiters, None
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)


class ReaderWatch:
    """Cuts a peer that does not read.

    While a sender waits, the peer has to take ``send_high_water`` bytes within every `timeout_s`, or all that
    the kernel has for it. What the kernel holds counts as not taken: it makes room in large steps, behind
    which a slow reader would look like none.
    """

    __slots__ = ("_connection", "_seen", "_timeout_s", "deadline", "queue_item")

    def __init__(self, connection: ClosingConnection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._seen = 0
        self.deadline = NEVER
        self.queue_item: list[Any] | None = None

    def begin(self) -> None:
        """The sender has to wait."""
        self._seen = sum(self._unsent())
        self._connection.service.deadlines.set(self, self._timeout_s)

    def deadline_reached(self) -> None:
        """Called by Deadlines."""
        connection = self._connection
        ours, kernels = self._unsent()
        taken = self._seen - ours - kernels
        if kernels and taken < connection.service.settings.flow.send_high_water:
            connection.cut(
                RemoteProtocolError(
                    f"it took {max(taken, 0)} bytes of the response in {self._timeout_s:g} s",
                    cause="slow_reader",
                )
            )
        else:
            self.begin()

    def _unsent(self) -> tuple[int, int]:
        """Bytes in the transport, and in the kernel; where that cannot be told, it seems to have some."""
        transport = self._connection.transport
        return transport.get_write_buffer_size(), _count_unsent(transport.get_extra_info("socket"))


def _count_unsent(sock: Any) -> int:
    if _TIOCOUTQ is None or sock is None:
        return 1
    try:
        count: int = struct.unpack("i", ioctl(sock.fileno(), _TIOCOUTQ, b"\0\0\0\0"))[0]
    except OSError:
        return 1
    return count
