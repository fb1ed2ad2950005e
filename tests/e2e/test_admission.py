"""Admission over the workers of a pool: real processes, real signals, one limit for all of them."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness import Answer, AnswerReader, wait_until
from supervised import Supervised, begin, get

# Each request leaves a file while it is at work, and works until the file "go" is there.
APP = """
import asyncio, os, pathlib, uuid

here = pathlib.Path(os.environ["ADMISSION_TEST_FOLDER"])

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return
    headers = [(b"content-type", b"text/plain")]
    if scope["path"] not in ("/pid", "/health"):
        name = here / "work" / f"{os.getpid()}-{uuid.uuid4().hex}"
        name.touch()
        try:
            while not (here / "go").exists():
                await asyncio.sleep(0.01)
        finally:
            name.unlink()
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": str(os.getpid()).encode()})
"""


class Pool:
    """Workers that serve APP, and clients that hold connections to them."""

    def __init__(self, supervised: Supervised, folder: Path) -> None:
        self.supervised = supervised
        self.folder = folder
        self.clients: list[socket.socket] = []

    @property
    def port(self) -> int:
        return self.supervised.port

    def at_work(self) -> Counter[int]:
        """How many requests are at work in which process."""
        names = os.listdir(self.folder / "work")
        living = self.supervised.pids()
        return Counter(pid for name in names if (pid := int(name.partition("-")[0])) in living)

    def wait_at_work(self, count: int) -> None:
        wait_until(lambda: self.at_work().total() == count, 10, f"{count} at work, not {self.at_work()}")

    def begin(self, path: str = "/") -> socket.socket:
        self.clients.append(begin(self.port, path))
        return self.clients[-1]

    def go(self) -> None:
        (self.folder / "go").touch()

    def stop_going(self) -> None:
        (self.folder / "go").unlink()


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    @contextmanager
    def start(**settings: Any) -> Iterator[Pool]:
        (tmp_path / "admitted.py").write_text(APP)
        (tmp_path / "work").mkdir()
        monkeypatch.setenv("ADMISSION_TEST_FOLDER", str(tmp_path))
        entry = "leanserve.worker.process:main"
        with ExitStack() as stack:
            flat = {"lifespan": "off", **settings}
            it = stack.enter_context(Supervised("admitted:app", tmp_path, flat, entry=entry))
            found = Pool(it, tmp_path)
            stack.callback(lambda: [client.close() for client in found.clients])
            it.wait_ready(settings.get("workers", 1))
            yield found
            found.go()
            assert it.stop() == 0

    return start


def answers(clients: list[socket.socket], within_s: float = 10.0) -> list[Answer | None]:
    """The answer of each, None for those that have none yet: what is there within the time is read."""
    found: list[Answer | None] = []
    end = time.monotonic() + within_s
    for client in clients:
        client.settimeout(max(end - time.monotonic(), 0.01))
        try:
            found.append(AnswerReader(client).read())
        except TimeoutError:
            found.append(None)
    return found


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_exactly_as_many_as_the_limits_say(
    pool: Callable[..., Any], loop: str, start_method: str
) -> None:
    settings = {"workers": 4, "max_concurrent_requests": 7, "max_queue": 11, "loop": loop}
    with pool(**settings, start_method=start_method) as it:
        threads = [threading.Thread(target=it.begin) for _ in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        it.wait_at_work(7)
        early = answers(it.clients, within_s=1.0)
        refused = [answer for answer in early if answer is not None]
        assert len(refused) == 60 - 7 - 11
        assert {answer.status for answer in refused} == {503}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert it.at_work().total() == 7
        assert get(it.port, "/health").isdigit()  # while it is full
        rest = [client for client, answer in zip(it.clients, early, strict=True) if answer is None]
        it.go()
        served = answers(rest)
        assert [answer.status if answer else 0 for answer in served] == [200] * 18
        it.wait_at_work(0)


def test_the_slots_are_the_pools_and_not_one_workers(pool: Callable[..., Any]) -> None:
    """Whichever workers the connections reach: the sum is what counts."""
    with pool(workers=3, max_concurrent_requests=4) as it:
        for _ in range(4):
            it.begin()
        it.wait_at_work(4)
        for _ in range(12):
            (answer,) = answers([it.begin()])
            assert answer is not None
            assert answer.status == 503
        assert it.at_work().total() == 4


@pytest.mark.parametrize("workers", [1, 3])
def test_a_killed_worker_gives_back_what_it_held(pool: Callable[..., Any], workers: int) -> None:
    with pool(workers=workers, max_concurrent_requests=5, max_queue=4) as it:
        for round_ in range(3):
            for _ in range(9):
                it.begin()
            it.wait_at_work(5)
            victim, held = it.at_work().most_common(1)[0]
            assert held
            os.kill(victim, signal.SIGKILL)
            it.supervised.wait_ready(workers + round_ + 1)
            # The waiters of other workers have moved up; fresh ones fill what is free.
            while it.at_work().total() < 5:
                it.begin()
                time.sleep(0.02)
                assert len(it.clients) < 200
            time.sleep(0.2)
            assert it.at_work().total() == 5
            it.go()
            it.wait_at_work(0)
            answers(it.clients)
            it.stop_going()
            for client in it.clients:
                client.close()
            it.clients.clear()
        # All of them are there still: five at work, four that wait, and the next is refused.
        for _ in range(9):
            it.begin()
        it.wait_at_work(5)
        assert answers(it.clients, 0.3) == [None] * 9
        (tenth,) = answers([it.begin()])
        assert tenth is not None
        assert tenth.status == 503


def test_waiters_that_leave_make_room(pool: Callable[..., Any]) -> None:
    with pool(workers=2, max_concurrent_requests=1, max_queue=3) as it:
        it.begin()
        it.wait_at_work(1)
        last: list[socket.socket] = []

        def three_wait() -> bool:
            last[:] = [it.begin() for _ in range(3)]
            if answers(last, 0.2) == [None] * 3:
                return True
            for waiter in last:  # those before have not been seen leaving yet
                reset(waiter)
            return False

        for _ in range(5):
            wait_until(three_wait, 10, "three wait again")
            (refused,) = answers([it.begin()])
            assert refused is not None
            assert refused.status == 503
            for waiter in last:
                reset(waiter)
        wait_until(three_wait, 10, "three wait again")
        assert it.at_work().total() == 1
        it.go()
        assert [answer and answer.status for answer in answers(last)] == [200] * 3


def test_a_slot_that_one_worker_frees_is_for_the_waiters_of_all(pool: Callable[..., Any]) -> None:
    with pool(workers=4, max_concurrent_requests=2, max_queue=40, queue_timeout=20.0) as it:
        for _ in range(42):
            it.begin()
        it.wait_at_work(2)
        it.go()
        served = answers(it.clients)
        assert [answer and answer.status for answer in served] == [200] * 42
        assert len({answer.body for answer in served if answer}) > 1


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_a_roll_keeps_the_limit(pool: Callable[..., Any], start_method: str) -> None:
    flat = {"workers": 2, "max_concurrent_requests": 3, "max_queue": 2, "drain_timeout": 20.0}
    with pool(**flat, start_method=start_method) as it:
        before = it.supervised.pids()
        first = [it.begin() for _ in range(3)]
        it.wait_at_work(3)
        first += [it.begin() for _ in range(2)]
        assert answers(first, 0.3) == [None] * 5
        it.supervised.send(signal.SIGHUP)
        # The old ones hold their slots while their successors already accept.
        it.supervised.wait_ready(3)
        for _ in range(6):
            (answer,) = answers([it.begin()])
            assert answer is not None
            assert answer.status == 503
        assert it.at_work().total() == 3
        it.go()
        assert [answer and answer.status for answer in answers(first)] == [200] * 5
        wait_until(lambda: not before & it.supervised.pids(), 20, "the old workers are gone")
        it.supervised.wait_ready(4)
        it.stop_going()
        again = [it.begin() for _ in range(3)]
        it.wait_at_work(3)
        again += [it.begin() for _ in range(2)]
        assert answers(again, 0.3) == [None] * 5
        (answer,) = answers([it.begin()])
        assert answer is not None
        assert answer.status == 503
        assert it.at_work().total() == 3


def test_a_worker_that_is_waiting_sleeps(pool: Callable[..., Any]) -> None:
    """Several watch one pipe: they wake when a token comes, and not in a circle."""

    def cpu_s(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    with pool(workers=3, max_concurrent_requests=1, max_queue=30) as it:
        for _ in range(25):
            it.begin()
        it.wait_at_work(1)
        time.sleep(0.3)
        before = {pid: cpu_s(pid) for pid in it.supervised.pids()}
        time.sleep(2)
        used = {pid: cpu_s(pid) - spent for pid, spent in before.items()}
        assert max(used.values()) < 1.0, used  # one that turns in a circle takes all of the two seconds
        it.go()
        assert [answer and answer.status for answer in answers(it.clients)] == [200] * 25
