"""The flight recorder: what a worker has at work, in memory that outlives it.

A crash comes with the request that causes it, often in its first millisecond, so each request is noted as it
begins: its method and path, in a *berth* of the worker's own; when it ends the berth is empty. With the tick
of the loop, once a second, its age and id are added. The supervisor reads the berths of a worker that has
ended.

The berths lie behind the scoreboard, in the same file without a name; pages that nobody writes to cost
nothing.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection, Sequence
from struct import Struct
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from leanserve.scoreboard import LANES, MAX_SLOTS, SCOREBOARD_BYTES

if TYPE_CHECKING:
    import ctypes

    Berth = ctypes.Array[ctypes.c_char]

__all__ = ["BERTHS", "TARGET_BYTES", "Flight", "FlightRecorder", "FlightRecords", "describe_flights"]

#: How many requests of one worker are noted at a time; those beyond are counted and not named.
BERTHS = 512
# Monotonic seconds at which it began (0.0: not told yet), its id, method and path (the path alone for a GET).
_LAYOUT = Struct("d40s144s")
_DETAILS = Struct("d40s")
_ID_BYTES, TARGET_BYTES = 40, 143  # a target has a zero behind it
_LANE_BYTES = BERTHS * _LAYOUT.size
_BEGIN = -(-SCOREBOARD_BYTES // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
assert _LANE_BYTES % mmap.ALLOCATIONGRANULARITY == 0
_GET = b"GET"
# A line of a log has an end.
_SHOWN = 5


def _place(slot: int, lane: int) -> int:
    return _BEGIN + (slot * LANES + lane) * _LANE_BYTES


class FlightRecorder:
    """The worker's side.

    Args:
        fd: of the scoreboard.
        slot, lane: the worker's place there.

    Attributes:
        free: berths in which nothing is noted. A request takes the last one and sets its ``value``, at most
            :data:`TARGET_BYTES`; at its end it empties the berth and gives it back. The worker does that
            without a call: it is in the path of every request.
        detailed: ids of the berths to which an age was added; :meth:`forget` is for those.
    """

    def __init__(self, fd: int, slot: int, lane: int) -> None:
        import ctypes  # in a worker of a pool it is there: it was asked for the death of the parent

        self._memory = mmap.mmap(fd, _LANE_BYTES, offset=_place(slot, lane))
        kind = ctypes.c_char * (TARGET_BYTES + 1)
        offsets = range(_DETAILS.size, _LANE_BYTES, _LAYOUT.size)
        self.free: list[Berth] = [kind.from_buffer(self._memory, offset) for offset in reversed(offsets)]
        self._offsets = dict(zip(map(id, reversed(self.free)), offsets, strict=True))
        self.detailed: set[int] = set()

    def forget(self, berth: Berth) -> None:
        """A request has ended whose age may be noted."""
        if id(berth) in self.detailed:
            self.detailed.remove(id(berth))
            _DETAILS.pack_into(self._memory, self._offsets[id(berth)] - _DETAILS.size, 0.0, b"")

    def note_ages(self, running: Collection[Any], id_field: bytes) -> None:
        """Add age and id of those that are new since the last time.

        Args:
            running: the exchanges at work.
            id_field: of the request, in lower case; b"" for none.
        """
        if len(running) > BERTHS:
            return  # to look at all of them would take the loop from them
        now = monotonic()
        for exchange in running:
            berth = exchange.berth
            if berth is None or id(berth) in self.detailed:
                continue
            self.detailed.add(id(berth))
            request = getattr(exchange, "request", None)
            headers = () if request is None or not id_field else request.headers
            request_id = next((value for name, value in headers if name == id_field), b"")
            place = self._offsets[id(berth)] - _DETAILS.size
            _DETAILS.pack_into(self._memory, place, exchange.started or now, request_id[:_ID_BYTES])


class Flight(NamedTuple):
    """One request that was at work.

    Attributes:
        target: method and path; the end of a long one is missing.
        request_id: what the field of request ids said, or b"".
        began_s: monotonic seconds; 0.0 when it began after the worker's last tick.
    """

    target: bytes
    request_id: bytes
    began_s: float

    def describe(self, now_s: float, tick_s: float) -> str:
        """For a log line: no control byte, nothing but ASCII.

        Args:
            now_s: when the worker has ended, in monotonic seconds.
            tick_s: when its loop has last ticked.
        """
        method, blank, path = self.target.partition(b" ")
        if not blank:
            method, path = _GET, self.target
        age = f"{now_s - self.began_s:.1f} s" if self.began_s else f"less than {now_s - tick_s + 0.05:.1f} s"
        mark = "..." if len(self.target) == TARGET_BYTES else ""
        name = f" (id {self.request_id.decode('latin-1')!a})" if self.request_id else ""
        return f"{method.decode('latin-1')} {path.decode('latin-1')!a}{mark} {age}{name}"


class FlightRecords:
    """The supervisor's side: the berths of all workers.

    Args:
        fd: of the scoreboard; the file is made longer.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        os.ftruncate(fd, _place(MAX_SLOTS, 0))

    def take(self, slot: int, lane: int) -> list[Flight]:
        """What the worker of a lane had at work at its end, the oldest first; the berths are empty then."""
        place = _place(slot, lane)
        data = os.pread(self._fd, _LANE_BYTES, place)
        found = []
        for number, (began_s, request_id, target) in enumerate(_LAYOUT.iter_unpack(data)):
            if began_s or target[0]:
                os.pwrite(self._fd, bytes(_LAYOUT.size), place + number * _LAYOUT.size)
            if target[0]:
                found.append(Flight(target.partition(b"\0")[0], request_id.rstrip(b"\0"), began_s))
        return sorted(found, key=lambda flight: flight.began_s or float("inf"))


def describe_flights(flights: Sequence[Flight], in_flight: int, now_s: float, tick_s: float) -> str:
    """The first of them for a log line, behind the number `in_flight`; "" for none.

    Args:
        flights: the oldest first.
        in_flight: how many there were; those beyond the berths are not among `flights`.
        now_s: when the worker has ended, in monotonic seconds.
        tick_s: when its loop has last ticked.
    """
    if not flights:
        return ""
    shown = [flight.describe(now_s, tick_s) for flight in flights[:_SHOWN]]
    more = in_flight - len(shown)
    return f": {', '.join(shown)}{f' and {more} more' if more > 0 else ''}"
