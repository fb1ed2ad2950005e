"""The queue of signals: in order, without loss, and given back."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator

import pytest

from leanserve.supervisor.signals import HANDLED, SignalQueue


@pytest.fixture
def queue() -> Iterator[SignalQueue]:
    before = {number: signal.getsignal(number) for number in HANDLED}
    it = SignalQueue()
    it.open()
    yield it
    try:
        it.close()
    except OSError:
        pass  # closed by the test
    for number, handler in before.items():
        assert signal.getsignal(number) is handler
        signal.signal(number, handler)


def readable(queue: SignalQueue) -> bool:
    return bool(select.select([queue], [], [], 0)[0])


def test_in_order_and_once(queue: SignalQueue) -> None:
    assert not readable(queue)
    assert queue.take() == []
    sent = [signal.SIGHUP, signal.SIGTERM, signal.SIGTTIN, signal.SIGTERM, signal.SIGINT]
    for number in sent:
        signal.raise_signal(number)
    assert readable(queue)
    assert queue.take() == sent
    assert not readable(queue)
    assert queue.take() == []


def test_a_signal_ends_a_sleep(queue: SignalQueue) -> None:
    child = os.fork()
    if not child:
        os.kill(os.getppid(), signal.SIGTTOU)
        os._exit(0)
    assert select.select([queue], [], [], 10)[0]
    os.waitpid(child, 0)
    assert {signal.SIGTTOU} <= set(queue.take()) <= {signal.SIGTTOU, signal.SIGCHLD}


def test_more_than_the_pipe_holds(queue: SignalQueue) -> None:
    for _ in range(70_000):
        signal.raise_signal(signal.SIGHUP)
    assert len(queue.take()) == 70_000
    assert not readable(queue)


def test_a_child_has_none_of_it(queue: SignalQueue) -> None:
    child = os.fork()
    if not child:
        queue.leave_in_child()
        usual = all(signal.getsignal(number) == signal.SIG_DFL for number in HANDLED)
        os._exit(0 if usual and signal.set_wakeup_fd(-1) == -1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    signal.raise_signal(signal.SIGHUP)
    assert signal.SIGHUP in queue.take()


def test_ignored_at_the_end_of_a_process() -> None:
    child = os.fork()
    if not child:
        queue = SignalQueue()
        queue.open()
        queue.close(ignore=True)
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_former_handlers_and_the_wakeup_descriptor_come_back() -> None:
    calls: list[int] = []
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    former = signal.signal(signal.SIGHUP, lambda number, _frame: calls.append(number))
    wakeup = signal.set_wakeup_fd(writer)
    try:
        queue = SignalQueue()
        queue.open()
        signal.raise_signal(signal.SIGHUP)
        assert calls == []
        queue.close()
        signal.raise_signal(signal.SIGHUP)
        assert calls == [signal.SIGHUP]
        assert os.read(reader, 9) == bytes([signal.SIGHUP])
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGHUP, former)
        os.close(reader)
        os.close(writer)
