"""The scoreboard: one shared page in which every worker writes its facts and others read them.

A slot has two records, its *lanes*, because two workers live in one slot while a successor takes over; each
worker writes to one record, and no record has two writers. Every value is one aligned 64-bit word, which
the machine writes whole, so there are no locks. Gauges start from zero with each worker, counters never go
back. Times are nanoseconds of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NamedTuple

from leanserve.errors import SettingsError
from leanserve.tally import Tally, Totals

__all__ = [
    "LANES",
    "MAX_SLOTS",
    "SCOREBOARD_BYTES",
    "Lane",
    "Record",
    "Scoreboard",
    "ServerRecord",
    "WorkerState",
]

MAX_SLOTS = 256
LANES = 2
_WORDS = 128  # per record; what no field has is room for more
_SERVER = MAX_SLOTS * LANES * _WORDS  # where the supervisor's words begin
#: From here on the file is somebody else's (leanserve.flight).
SCOREBOARD_BYTES = (_SERVER + _WORDS) * 8


class WorkerState(IntEnum):
    """What a worker says about itself."""

    NONE = 0
    BOOTING = 1
    READY = 2
    DRAINING = 3
    STOPPED = 4


class _Word(IntEnum):
    PID = 0
    STATE = 1
    GENERATION = 2
    HEARTBEAT_NS = 3
    READY_NS = 4
    IN_FLIGHT = 5
    CONNECTIONS = 6
    WEBSOCKETS = 7
    # counters, from here on
    REQUESTS = 8
    CONNECTIONS_TOTAL = 9
    WEBSOCKETS_TOTAL = 10
    BYTES_IN = 11
    BYTES_OUT = 12
    # of the worker in the lane, from its start
    HEADS_RECOGNISED = 13
    HEADS_DECLINED = 14
    FRAMES_RECOGNISED = 15
    FRAMES_DECLINED = 16
    # tokens of the pool that the worker in the lane holds
    SLOTS_HELD = 17
    PLACES_HELD = 18
    # of the certificate that the worker in the lane shows, in seconds since 1970; 0: none, or not known
    CERTIFICATE_EXPIRY_S = 24
    # gauges
    LOOP_LAG_NS = 32
    APP_NOT_READY = 33
    # counters
    LOOP_LAG_TOTAL_NS = 34
    #: From here on what a Tally has, in its order.
    TALLY = 36


_GAUGES = (
    *range(_Word.REQUESTS), _Word.SLOTS_HELD, _Word.PLACES_HELD, _Word.LOOP_LAG_NS, _Word.APP_NOT_READY,
    _Word.CERTIFICATE_EXPIRY_S,
)  # fmt: skip


class _ServerWord(IntEnum):
    PID = 0
    BORN_NS = 1
    READY_NS = 2
    STOPPING = 3
    ROLLING = 4
    SLOTS = 5
    CRASHES = 6
    RESTARTS = 7
    WATCHED = 8
    PARTNER = 9
    PARTNER_SLOTS = 10


class ServerRecord(NamedTuple):
    """What the supervisor has written.

    Attributes:
        pid: the supervisor's.
        born_ns, ready_ns: when it began, and when its first worker was ready (0: not yet).
        stopping, rolling: 1 while it stops, or replaces workers.
        slots: how many workers there should be.
        crashes: workers that have ended without being told to.
        restarts: workers that were started in a slot that had had one.
        watched: 1 when somebody reads what workers count of their requests.
        partner: pid of another supervisor that holds the same listeners, during an upgrade; or 0.
        partner_slots: the slots whose own listeners it holds are those before this one.
    """

    pid: int
    born_ns: int
    ready_ns: int
    stopping: int
    rolling: int
    slots: int
    crashes: int
    restarts: int
    watched: int
    partner: int
    partner_slots: int


class Record(NamedTuple):
    """What one worker has written. Gauges are of now; counters are of all workers this lane has had.

    Attributes:
        loop_lag_ns: how late the last tick of the event loop came; `loop_lag_total_ns` sums these up.
        app_not_ready: 1 while the application says that it should get no requests.
        certificate_expiry_s: of the certificate that it shows, in seconds since 1970; 0: none, or not known.
        totals: what the worker has counted of its requests.
    """

    slot: int
    lane: int
    pid: int
    state: WorkerState
    generation: int
    heartbeat_ns: int
    ready_ns: int
    in_flight: int
    connections: int
    websockets: int
    requests: int
    connections_total: int
    websockets_total: int
    bytes_in: int
    bytes_out: int
    heads_recognised: int
    heads_declined: int
    frames_recognised: int
    frames_declined: int
    slots_held: int
    places_held: int
    loop_lag_ns: int
    app_not_ready: int
    loop_lag_total_ns: int
    totals: Totals
    certificate_expiry_s: int = 0


class Lane:
    """The writer's side: the record of one worker. Cheap enough for every request."""

    __slots__ = (
        "_accepted", "_base", "_connections", "_in_flight", "_places_held", "_slots_held", "_words",
    )  # fmt: skip

    def __init__(self, words: memoryview[int], base: int) -> None:
        self._words = words
        self._base = base
        # Computed once: these are used with every request or connection.
        self._in_flight = base + _Word.IN_FLIGHT
        self._slots_held = base + _Word.SLOTS_HELD
        self._places_held = base + _Word.PLACES_HELD
        self._connections = base + _Word.CONNECTIONS
        self._accepted = base + _Word.CONNECTIONS_TOTAL

    def begin(self, pid: int, generation: int) -> None:
        """A new worker takes the lane: its gauges are zero, the counters stay."""
        for word in _GAUGES:
            self._words[self._base + word] = 0
        self._words[self._base + _Word.GENERATION] = generation
        self._words[self._base + _Word.STATE] = WorkerState.BOOTING
        self._words[self._base + _Word.PID] = pid

    def enter(self, state: WorkerState, now_ns: int) -> None:
        """Tell the state."""
        self._words[self._base + _Word.STATE] = state
        if state is WorkerState.READY:
            self._words[self._base + _Word.READY_NS] = now_ns

    def beat(self, now_ns: int) -> None:
        """The event loop is alive."""
        self._words[self._base + _Word.HEARTBEAT_NS] = now_ns

    @property
    def watched(self) -> bool:
        """Whether anybody reads what :meth:`tell_tally` writes."""
        return self._words[_SERVER + _ServerWord.WATCHED] != 0

    @property
    def partner(self) -> tuple[int, int]:
        """Pid of another supervisor that holds the same listeners, or 0; of how many slots."""
        return self._words[_SERVER + _ServerWord.PARTNER], self._words[_SERVER + _ServerWord.PARTNER_SLOTS]

    def tell_tally(self, tally: Tally) -> None:
        """Add what was counted since the last time; `tally` is empty then."""
        begin = self._base + _Word.TALLY
        for place, number in tally.take():
            self._words[begin + place] += number

    def tell_lag(self, lag_ns: int) -> None:
        """The loop came so late to its last tick."""
        self._words[self._base + _Word.LOOP_LAG_NS] = lag_ns
        self._words[self._base + _Word.LOOP_LAG_TOTAL_NS] += lag_ns

    def tell_app_ready(self, ready: bool) -> None:
        """Whether the application wants requests."""
        self._words[self._base + _Word.APP_NOT_READY] = not ready

    def tell_certificate(self, expiry_s: int) -> None:
        """Until when our certificate is valid, in seconds since 1970."""
        self._words[self._base + _Word.CERTIFICATE_EXPIRY_S] = expiry_s

    def tell_in_flight(self, number: int) -> None:
        """So many exchanges and WebSockets are at work."""
        self._words[self._in_flight] = number

    def count_done(self, requests: int, bytes_in: int, bytes_out: int) -> None:
        """So many more have ended, with so many bytes of bodies in either direction; told once a second."""
        words, base = self._words, self._base
        words[base + _Word.REQUESTS] += requests
        words[base + _Word.BYTES_IN] += bytes_in
        words[base + _Word.BYTES_OUT] += bytes_out

    def tell_fastpath(
        self, heads_recognised: int, heads_declined: int, frames_recognised: int, frames_declined: int
    ) -> None:
        """How much of the traffic the fast path has taken, and left; told once a second."""
        base = self._base
        self._words[base + _Word.HEADS_RECOGNISED] = heads_recognised
        self._words[base + _Word.HEADS_DECLINED] = heads_declined
        self._words[base + _Word.FRAMES_RECOGNISED] = frames_recognised
        self._words[base + _Word.FRAMES_DECLINED] = frames_declined

    def hold_slots(self, change: int) -> None:
        """So many more requests, or fewer, are at work under the limit of the pool."""
        self._words[self._slots_held] += change

    def hold_places(self, change: int) -> None:
        """So many more, or fewer, wait in its queue."""
        self._words[self._places_held] += change

    def connection_opened(self) -> None:
        """A connection was accepted."""
        self._words[self._connections] += 1
        self._words[self._accepted] += 1

    def connection_closed(self) -> None:
        """A connection is gone."""
        self._words[self._connections] -= 1

    def websocket_opened(self) -> None:
        """A WebSocket handshake was accepted."""
        self._words[self._base + _Word.WEBSOCKETS] += 1
        self._words[self._base + _Word.WEBSOCKETS_TOTAL] += 1

    def websocket_closed(self) -> None:
        """A WebSocket is gone."""
        self._words[self._base + _Word.WEBSOCKETS] -= 1


class Scoreboard:
    """The page itself, mapped into this process.

    Attributes:
        fd: descriptor of the page, to be inherited by workers; it has no name in any file system.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, SCOREBOARD_BYTES)
        self._words = memoryview(self._map).cast("q")

    @classmethod
    def create(cls) -> Scoreboard:
        """A new page, all zero."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("leanserve-scoreboard", os.MFD_CLOEXEC)
        else:
            import tempfile

            with tempfile.TemporaryFile() as file:  # already without a name
                fd = os.dup(file.fileno())
        os.ftruncate(fd, SCOREBOARD_BYTES)
        return cls(fd)

    def lane(self, slot: int, lane: int) -> Lane:
        """The writer for one worker of a slot."""
        return Lane(self._words, _base(slot, lane))

    def read(self, slot: int, lane: int) -> Record:
        """One record as it stands."""
        base = _base(slot, lane)
        words = self._words[base : base + _WORDS].tolist()
        fields: dict[str, Any] = {word.name.lower(): words[word] for word in _Word if word is not _Word.TALLY}
        fields["state"] = WorkerState(fields["state"])
        return Record(slot, lane, **fields, totals=Totals.of(words[_Word.TALLY :]))

    def records(self) -> Iterator[Record]:
        """The records of all lanes that ever had a worker, by slot."""
        for slot in range(MAX_SLOTS):
            for lane in range(LANES):
                if self._words[_base(slot, lane) + _Word.PID]:
                    yield self.read(slot, lane)

    def bury(self, slot: int, lane: int, pid: int) -> None:
        """A worker has ended, and may not have been able to say so. Nobody else writes the record then."""
        base = _base(slot, lane)
        if self._words[base + _Word.PID] == pid:
            self._words[base + _Word.STATE] = WorkerState.STOPPED

    def tell_server(self, **facts: int) -> None:
        """Write some of the supervisor's words; the names are those of :class:`ServerRecord`."""
        for name, value in facts.items():
            self._words[_SERVER + _ServerWord[name.upper()]] = value

    def read_server(self) -> ServerRecord:
        """What the supervisor has written."""
        return ServerRecord(*self._words[_SERVER : _SERVER + len(_ServerWord)].tolist())

    def close(self) -> None:
        """Unmap the page and close the descriptor."""
        self._words.release()
        self._map.close()
        os.close(self.fd)


def _base(slot: int, lane: int) -> int:
    if not 0 <= slot < MAX_SLOTS:
        raise SettingsError(f"at most {MAX_SLOTS} workers, not {slot + 1}")
    if not 0 <= lane < LANES:
        raise ValueError(f"lane {lane}")
    return (slot * LANES + lane) * _WORDS
