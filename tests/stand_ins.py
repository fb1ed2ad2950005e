"""Mains of worker processes that do as they are told; the application's name says what.

A supervisor resolves ``stand_ins:main`` in the worker. Nothing heavy is imported here, so that a test may
start many of them. What they do is written to the file that LEANSERVE_TEST_JOURNAL names.
"""

from __future__ import annotations

import os
import pickle
import random
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from leanserve.channel import DUMP_SIGNAL, Channel, WorkerSpec
from leanserve.scoreboard import Scoreboard, WorkerState

NEVER_S = 600.0


def main(spec: WorkerSpec) -> int:
    """Run the behaviour that the application's name says."""
    note(spec, "started")
    return BEHAVIOURS[spec.app](spec)


def main_of_spawned(fd: int) -> int:
    """The same in a fresh interpreter."""
    with os.fdopen(fd, "rb") as file:
        facts: dict[str, Any] = pickle.load(file)
    facts.pop("path", None)
    channel = Channel(socket.socket(fileno=facts.pop("channel")))
    channel.sock.setblocking(False)
    slots = [[socket.socket(fileno=number) for number in slot] for slot in facts.pop("listeners")]
    return main(WorkerSpec(channel=channel, listeners=slots, **facts))


def note(spec: WorkerSpec, event: str) -> None:
    """One line: event, pid, slot, generation, lane."""
    journal = os.environ.get("LEANSERVE_TEST_JOURNAL")
    if journal:
        line = f"{event} {os.getpid()} {spec.slot} {spec.generation} {spec.lane}\n"
        descriptor = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, line.encode())
        os.close(descriptor)


def say_ready(spec: WorkerSpec) -> None:
    """Listen when it is time, and say so."""
    listen(spec)
    note(spec, "ready")
    spec.channel.send({"event": "ready", "seconds": 0.0})


def listen(spec: WorkerSpec) -> None:
    """Ask whether it is time, and listen."""
    spec.channel.send({"event": "loaded"})
    if next_order(spec) != "open":
        os._exit(0)
    for sock in spec.listeners[spec.slot]:
        sock.listen(64)
    note(spec, "listens")


def wait_order(spec: WorkerSpec) -> str:
    """The next order; "orphan" when the supervisor is gone."""
    order = next_order(spec)
    if order != "orphan":
        note(spec, f"order-{order}")
    return order


def next_order(spec: WorkerSpec) -> str:
    """As above; what it is told of its siblings' queues is nothing to it."""
    while True:
        select.select([spec.channel], [], [])
        try:
            for message in spec.channel.receive():
                for fd in message.get("fds", ()):
                    os.close(fd)
                if "order" in message:
                    return str(message["order"])
        except EOFError:
            return "orphan"


def obey(spec: WorkerSpec) -> int:
    """What a good worker does."""
    say_ready(spec)
    wait_order(spec)
    note(spec, "left")
    return 0


def fail(spec: WorkerSpec) -> int:
    """A boot that ends with an explanation."""
    spec.channel.send({"event": "failed", "error": "no such model", "trace": "Traceback of it"})
    return 3


def fail_settings(spec: WorkerSpec) -> int:
    """A boot that ends because of a setting."""
    spec.channel.send({"event": "failed", "error": "bad setting", "trace": ""})
    return 2


def fail_later(spec: WorkerSpec) -> int:
    """The first worker of a slot serves, every other one cannot start."""
    return fail(spec) if spec.generation else obey(spec)


def killed_in_boot(spec: WorkerSpec) -> int:
    """A signal ends it before it is ready."""
    return suicide(signal.SIGSEGV)


def ready_and_dead(spec: WorkerSpec) -> int:
    """Says that it is ready and dies: both are seen in the same turn."""
    say_ready(spec)
    return 7


def ready_and_dead_later(spec: WorkerSpec) -> int:
    """The successors do that, after a moment in which the supervisor can be stopped."""
    if not spec.generation:
        return obey(spec)
    listen(spec)
    time.sleep(0.3)
    note(spec, "ready")
    spec.channel.send({"event": "ready", "seconds": 0.0})
    return 7


def dead_beside_the_old(spec: WorkerSpec) -> int:
    """The old one takes its time to leave, and meanwhile the successor dies."""
    say_ready(spec)
    if spec.generation:
        time.sleep(0.1)
        return 7
    if wait_order(spec) == "retire":
        time.sleep(0.5)
    return 0


def leaves_orphans(spec: WorkerSpec) -> int:
    """Dies, and a process of its own survives it for a moment."""
    if not os.fork():
        time.sleep(0.05)
        note(spec, "orphan-ends")
        os._exit(0)
    return ready_and_dead(spec)


def failed_and_dead(spec: WorkerSpec) -> int:
    """Its last words are a long line, and it is gone when they are read."""
    spec.channel.send({"event": "failed", "error": "last words", "trace": "x" * 100_000})
    return 3


def slow_boot(spec: WorkerSpec) -> int:
    """A long import."""
    time.sleep(NEVER_S)
    return 0


def stuck_boot(spec: WorkerSpec) -> int:
    """An import that is stuck in C code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
    time.sleep(NEVER_S)
    return 0


def slow_successor(spec: WorkerSpec) -> int:
    """The first of a slot serves, its successor takes for ever."""
    return slow_boot(spec) if spec.generation else obey(spec)


def stuck_successor(spec: WorkerSpec) -> int:
    """The same, and it hears no signal meanwhile."""
    return stuck_boot(spec) if spec.generation else obey(spec)


def slow_second_successor(spec: WorkerSpec) -> int:
    """In slot 1 the successor takes for ever."""
    return slow_successor(spec) if spec.slot else obey(spec)


def fails_twice(spec: WorkerSpec) -> int:
    """The two that follow the first cannot start."""
    return fail(spec) if spec.generation in (1, 2) else obey(spec)


def longer_than_planned(spec: WorkerSpec) -> int:
    """Asks for more time, and uses it."""
    spec.channel.send({"event": "extend", "seconds": 60.0})
    spec.channel.send({"event": "extend", "seconds": 0.1})  # never takes away what was given
    time.sleep(3.5)
    return obey(spec)


def all_full(spec: WorkerSpec) -> int:
    """The first worker of every slot is full when all are ready, and its successor takes a moment."""
    if spec.generation:
        time.sleep(0.3)
    say_ready(spec)
    if not spec.generation:
        time.sleep(0.5)
        spec.channel.send({"event": "full"})
        note(spec, "full")
    wait_order(spec)
    note(spec, "left")
    return 0


def hasty(spec: WorkerSpec) -> int:
    """Boots for a moment, fails now and then, is full now and then, and leaves after a moment."""
    board = Scoreboard(spec.scoreboard_fd)
    if os.path.exists(f"/proc/{board.read(spec.slot, spec.lane).pid or 'none'}"):
        note(spec, "third")  # somebody lives who writes the same record
    lane = board.lane(spec.slot, spec.lane)
    lane.begin(os.getpid(), spec.generation)
    chance = random.Random(os.getpid())
    if spec.generation:
        time.sleep(chance.choice((0.0, 0.02, 0.1)))
        if chance.random() < 0.1:
            return fail(spec)
    lane.enter(WorkerState.READY, time.monotonic_ns())
    say_ready(spec)
    if chance.random() < 0.2:
        spec.channel.send({"event": "full"})
    if wait_order(spec) == "retire":
        time.sleep(chance.choice((0.0, 0.05)))
    note(spec, "left")
    return 0


def ready_when_reported(spec: WorkerSpec) -> int:
    """The first takes until it is asked for its stacks."""
    if not spec.generation:
        signal.pthread_sigmask(signal.SIG_BLOCK, [DUMP_SIGNAL])
        Scoreboard(spec.scoreboard_fd).lane(spec.slot, spec.lane).begin(os.getpid(), 0)
        signal.sigwait([DUMP_SIGNAL])
    return obey(spec)


def stubborn(spec: WorkerSpec) -> int:
    """Ready, and deaf from then on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
    say_ready(spec)
    time.sleep(NEVER_S)
    return 0


def slow_to_leave(spec: WorkerSpec) -> int:
    """The first worker of a slot takes its time once it is told to go; a hurry shortens it."""
    say_ready(spec)
    if wait_order(spec) != "hurry" and not spec.generation:
        select.select([spec.channel], [], [], NEVER_S)
        wait_order(spec)
    return 0


def slow_to_leave_and_dead(spec: WorkerSpec) -> int:
    """The old one leaves while the fourth of its successors waits: those before were ready and died."""
    say_ready(spec)
    if spec.generation in (1, 2, 3):
        time.sleep(0.1)
        return suicide(signal.SIGKILL)
    wait_order(spec)
    if not spec.generation:
        time.sleep(0.45)
    return 0


def full(spec: WorkerSpec) -> int:
    """The first worker of a slot says twice that it is full."""
    say_ready(spec)
    if not spec.generation:
        spec.channel.send({"event": "full"})
        time.sleep(0.3)
        spec.channel.send({"event": "full"})
    wait_order(spec)
    return 0


def second_starts_late(spec: WorkerSpec) -> int:
    """In slot 1 the first worker needs a while, and its successor a while more."""
    if spec.slot:
        time.sleep(1.0 if spec.generation else 0.6)
    return obey(spec)


def late_successor(spec: WorkerSpec) -> int:
    """The first is ready at once, its successors later."""
    if spec.generation:
        time.sleep(0.6)
    return obey(spec)


def busy(spec: WorkerSpec) -> int:
    """The first worker has three requests at work; its successors die before they have a record."""
    if spec.generation:
        return suicide(signal.SIGKILL)
    lane = Scoreboard(spec.scoreboard_fd).lane(spec.slot, spec.lane)
    lane.begin(os.getpid(), spec.generation)
    lane.tell_in_flight(3)
    return obey(spec)


def holds_tokens(spec: WorkerSpec) -> int:
    """Two requests are at work in each worker, and one waits."""
    from leanserve.worker.slots import make_slots  # and with it asyncio

    board = Scoreboard(spec.scoreboard_fd)
    for place in range(spec.loops):
        lane = board.lane(spec.slot + place, spec.lane)
        lane.begin(os.getpid(), spec.generation)
        slots, places = make_slots(spec.settings.admission, lane, spec.tokens)
        if not (slots.take() and slots.take() and places.take()):
            return 1
    return obey(spec)


def broken_stdout(spec: WorkerSpec) -> int:
    """Slot 1 leaves with text in a buffer that nobody can take any more."""
    if spec.slot:
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = os.fdopen(writer, "w")
        sys.stdout.write("lost")
        say_ready(spec)
        time.sleep(0.3)
        return 1
    return obey(spec)


def no_stdout(spec: WorkerSpec) -> int:
    """A program without standard streams."""
    sys.stdout = sys.stderr = None  # type: ignore[assignment]  # as under pythonw
    return obey(spec)


def bug(spec: WorkerSpec) -> int:
    """Something that no worker main lets out."""
    raise LookupError("a bug of the entry")


def parent_modules(spec: WorkerSpec) -> int:
    """Note what the parent had imported: a forked worker has it all from there."""
    heavy = {"asyncio", "ssl", "uvloop", "anyio", "h11", "wsproto"}
    note(spec, "modules:" + ",".join(sorted(heavy & sys.modules.keys())))
    return obey(spec)


def suicide(number: signal.Signals) -> int:
    """End by a signal."""
    signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
    os.kill(os.getpid(), number)
    time.sleep(NEVER_S)
    return 0


BEHAVIOURS: dict[str, Callable[[WorkerSpec], int]] = {
    function.__name__: function
    for function in (
        obey, fail, fail_settings, fail_later, killed_in_boot, ready_and_dead, ready_and_dead_later,
        dead_beside_the_old, leaves_orphans, failed_and_dead, slow_boot, stuck_boot, slow_successor,
        stubborn, slow_to_leave, slow_to_leave_and_dead, full, second_starts_late, late_successor, busy,
        holds_tokens, broken_stdout, stuck_successor, slow_second_successor, fails_twice,
        longer_than_planned, all_full, hasty, ready_when_reported,
        no_stdout, bug, parent_modules,
    )
}
