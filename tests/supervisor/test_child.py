"""One worker process: its table, its orders and signals, its end."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from math import inf

import pytest

from harness import wait_until
from leanserve.channel import Channel
from leanserve.supervisor.child import (
    Child,
    ChildMachine,
    ChildMove,
    ChildState,
    describe_exit,
    reap_strangers,
)
from machines import reachable, walk


def test_every_state_and_every_move() -> None:
    walk(ChildMachine, ChildState, ChildMove)


def test_nothing_leads_back() -> None:
    for state in ChildState:
        for later in reachable(ChildMachine, state):
            assert later >= state
    assert reachable(ChildMachine, ChildState.REAPED) == set()
    for state in ChildState:
        machine = ChildMachine()
        machine.state = state
        assert machine.accepts(ChildMove.REAP) is (state is not ChildState.REAPED)


def fork(body: Callable[[], None]) -> int:
    """A process that does this and ends with 0."""
    pid = os.fork()
    if not pid:
        try:
            body()
        finally:
            os._exit(1 if sys.exc_info()[0] else 0)
    return pid


def make(body: Callable[[Channel], None]) -> Child:
    ours, theirs = Channel.pair()
    pid = fork(lambda: body(theirs))
    theirs.close()
    return Child(pid, 2, 0, 0, ours, time.monotonic())


def end(child: Child) -> int:
    code: list[int] = []

    def ended() -> bool:
        found = child.wait()
        code.extend([] if found is None else [found])
        return bool(code)

    wait_until(ended, 5, "its end")
    child.bury()
    return code[0]


def hear(channel: Channel) -> None:
    select.select([channel], [], [])
    message = next(channel.receive())
    assert message == {"order": "drain"}


def test_a_ready_one_is_told_by_the_channel() -> None:
    child = make(hear)
    assert str(child) == f"3 (pid {child.pid})"
    child.machine.advance(ChildMove.TOLD_READY)
    child.retire("drain", 5.0)
    assert (child.state, child.kill_at_s) == (ChildState.RETIRING, 5.0)
    child.retire("drain", 9.0)
    assert child.kill_at_s == 5.0
    assert end(child) == 0
    assert child.state is ChildState.REAPED
    child.signal(signal.SIGKILL)  # nobody: the pid may be somebody else's


def test_one_that_boots_is_ended_by_a_signal_and_has_the_order_already() -> None:
    def body(channel: Channel) -> None:
        signal.sigwait([signal.SIGTERM])
        hear(channel)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        child = make(body)
        child.retire("drain", inf)
        assert end(child) == 0
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_killed_for_good() -> None:
    child = make(lambda _: time.sleep(60))
    assert child.wait() is None
    child.kill()
    child.retire("drain", 1.0)
    child.kill()
    assert child.kill_at_s == inf
    assert end(child) == -signal.SIGKILL


def test_one_without_a_channel_is_told_by_a_signal() -> None:
    def body(channel: Channel) -> None:
        channel.close()
        time.sleep(60)

    child = make(body)
    child.machine.advance(ChildMove.TOLD_READY)
    wait_until(lambda: select.select([child.channel], [], [], 0)[0], 5, "it has closed its end")
    child.retire("drain", inf)
    assert end(child) == -signal.SIGTERM


def test_a_code_that_somebody_else_took() -> None:
    child = make(lambda _: None)
    os.waitpid(child.pid, 0)
    assert end(child) == 0


def test_its_listeners_end_with_it_whoever_holds_copies() -> None:
    child = make(lambda _: None)
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    with listener.dup():
        child.listeners = [listener]
        end(child)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, 5)
    assert listener.fileno() == -1


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "exit code 0"), (3, "exit code 3"), (-9, "signal SIGKILL"), (-35, "signal 35"), (-99, "signal 99")],
)
def test_what_an_exit_says(code: int, words: str) -> None:
    assert describe_exit(code) == words
    child = Child(1, 0, 0, 0, Channel(socket.socket()), 0.0)
    assert child.describe_end(code) == words
    child.error = "its own words"
    assert child.describe_end(code) == "its own words"
    child.channel.close()


def test_strangers_are_reaped_and_ours_are_not() -> None:
    ours = fork(lambda: None)
    os.waitid(os.P_PID, ours, os.WEXITED | os.WNOWAIT)
    reap_strangers({ours})
    assert os.waitpid(ours, 0)[0] == ours
    strangers = [fork(lambda: None) for _ in range(3)]
    for pid in strangers:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    reap_strangers(set())
    for pid in strangers:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, 0)
    reap_strangers(set())
