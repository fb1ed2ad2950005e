"""The scoreboard: lanes, gauges and counters, seen from other processes."""

from __future__ import annotations

import os
import struct

import pytest

from leanserve.errors import SettingsError
from leanserve.scoreboard import MAX_SLOTS, Scoreboard, WorkerState


@pytest.fixture
def board() -> Scoreboard:
    return Scoreboard.create()


def test_what_is_written_is_read(board: Scoreboard) -> None:
    lane = board.lane(3, 1)
    lane.begin(77, 5)
    lane.enter(WorkerState.READY, 1000)
    lane.beat(2000)
    for _ in range(3):
        lane.connection_opened()
        lane.tell_in_flight(3)
    lane.websocket_opened()
    lane.tell_in_flight(1)
    lane.count_done(2, 11, 22)
    lane.connection_closed()
    lane.websocket_closed()
    lane.hold_slots(4)
    lane.hold_slots(-1)
    lane.hold_places(2)
    record = board.read(3, 1)
    assert (record.slots_held, record.places_held) == (3, 2)
    assert (record.slot, record.lane, record.pid, record.generation) == (3, 1, 77, 5)
    assert record.state is WorkerState.READY
    assert (record.ready_ns, record.heartbeat_ns) == (1000, 2000)
    assert (record.in_flight, record.connections, record.websockets) == (1, 2, 0)
    assert (record.requests, record.connections_total, record.websockets_total) == (2, 3, 1)
    assert (record.bytes_in, record.bytes_out) == (11, 22)
    board.close()


def test_only_the_state_ready_has_a_time(board: Scoreboard) -> None:
    lane = board.lane(0, 0)
    lane.begin(1, 0)
    assert board.read(0, 0).state is WorkerState.BOOTING
    lane.enter(WorkerState.DRAINING, 55)
    assert board.read(0, 0).ready_ns == 0
    board.close()


def test_counters_never_go_back_and_gauges_start_anew(board: Scoreboard) -> None:
    lane = board.lane(0, 0)
    for generation in range(3):
        lane.begin(100 + generation, generation)
        before = board.read(0, 0)
        assert (before.in_flight, before.connections, before.heartbeat_ns, before.ready_ns) == (0, 0, 0, 0)
        assert before.requests == generation
        assert before.connections_total == 2 * generation
        lane.connection_opened()
        lane.connection_opened()
        lane.enter(WorkerState.READY, 9)
        lane.beat(9)
        lane.tell_in_flight(1)  # and dies with one in flight
        lane.count_done(1, 5, 5)
    assert board.read(0, 0).bytes_out == 15
    board.close()


def test_lanes_are_apart(board: Scoreboard) -> None:
    pairs = [(0, 0), (0, 1), (1, 0), (MAX_SLOTS - 1, 0), (MAX_SLOTS - 1, 1)]
    for number, (slot, lane) in enumerate(pairs, 1):
        board.lane(slot, lane).begin(number, number)
        board.lane(slot, lane).tell_in_flight(number)
    found = [(record.slot, record.lane, record.pid, record.in_flight) for record in board.records()]
    assert found == [(slot, lane, number, number) for number, (slot, lane) in enumerate(pairs, 1)]
    board.close()


def test_another_process_writes_the_same_page(board: Scoreboard) -> None:
    pid = os.fork()
    if not pid:
        lane = Scoreboard(board.fd).lane(2, 0)  # as a worker does: its own mapping of the descriptor
        lane.begin(os.getpid(), 1)
        lane.tell_in_flight(1)
        os._exit(0)
    os.waitpid(pid, 0)
    assert board.read(2, 0).pid == pid
    assert board.read(2, 0).in_flight == 1
    board.close()


def test_large_numbers(board: Scoreboard) -> None:
    lane = board.lane(0, 0)
    lane.tell_in_flight(-1)
    lane.count_done(1, 1 << 40, 1 << 50)
    lane.tell_in_flight(-1)
    lane.count_done(1, 1 << 40, 1 << 50)
    assert board.read(0, 0).bytes_out == 1 << 51
    with pytest.raises((ValueError, struct.error)):
        lane.count_done(1, 0, 1 << 63)
    board.close()


def test_limits(board: Scoreboard) -> None:
    with pytest.raises(SettingsError, match=f"at most {MAX_SLOTS} workers"):
        board.lane(MAX_SLOTS, 0)
    with pytest.raises(SettingsError):
        board.lane(-1, 0)
    with pytest.raises(ValueError, match="lane 2"):
        board.lane(0, 2)
    board.close()


def test_the_descriptor_is_private_and_goes(board: Scoreboard) -> None:
    assert not os.get_inheritable(board.fd)
    fd = board.fd
    board.close()
    with pytest.raises(OSError):
        os.fstat(fd)
