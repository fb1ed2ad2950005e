"""leanserve.worker.watchdog: what blocks the loop is named while it does, once, with its request."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leanserve.worker.watchdog import Watchdog
from served import LOOPS, Client, run, serving

HERE = Path(__file__).name
LIMIT = 0.3  # short, and longer than a busy machine keeps a process waiting


def messages(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [text for it in caplog.records if words in (text := it.getMessage())]


def told(caplog: pytest.LogCaptureFixture) -> str:
    """The one line about the stall that lasts, without what a machine without processor time adds."""
    (line,) = messages(caplog, "is stalled")
    return line.partition(" (no thread could run")[0]


def block_until_told(caplog: pytest.LogCaptureFixture) -> None:
    """Block the loop until the stall is reported: it can only be while it lasts. Too long is a failure."""
    caplog.clear()
    end = time.monotonic() + 20
    while not messages(caplog, "is stalled") and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(2 * LIMIT)  # eight looks more: they have nothing to add
    assert messages(caplog, "is stalled")
    assert not messages(caplog, "was stalled")


def serve(caplog: pytest.LogCaptureFixture, loop: str, block: Callable[[Any], Any], *heads: bytes) -> None:
    """Serve requests of which each calls `block` with its scope, and wait for the end of each stall."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            block(scope)
            await send({"type": "websocket.close"})
            return
        waits = block(scope)
        if waits is not None:
            await waits
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"ok"})

    async def main() -> None:
        async with serving(app, lifespan="off", stall_limit=LIMIT) as worker:
            for head in heads:
                async with await Client.open(worker) as client:
                    await client.send(head)
                    await client.read_all()
                for _ in range(200):
                    if messages(caplog, "was stalled"):
                        break
                    await asyncio.sleep(0.05)

    with caplog.at_level(logging.DEBUG, "leanserve"):
        run(loop, main)


def get(path: bytes) -> bytes:
    return b"GET " + path + b" HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize("loop", LOOPS)
def test_a_sleep_is_named_while_it_lasts(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    def block(scope: Any) -> None:
        block_until_told(caplog)

    serve(caplog, loop, block, get(b"/slow\"%1b'?secret=1"))
    began = told(caplog)
    assert began.isprintable()
    assert """ by GET '/slow"%1b\\'': """ in began
    assert "secret" not in began
    assert f"{HERE}:" in began
    assert began.endswith(" in block_until_told")
    (ended,) = messages(caplog, "was stalled")
    assert ended.endswith(" s and goes on")
    (stack,) = messages(caplog, "the stack of the stall")
    assert "in block\n" in stack
    assert "time.sleep(" in stack


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
def test_a_c_call_that_holds_the_lock_is_named_as_soon_as_it_lets_go(
    loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    exponent = 1 << 18
    while True:  # so large that it takes a few limits on this machine
        begin = time.thread_time()
        pow(3, exponent)
        if time.thread_time() - begin > 3 * LIMIT:
            break
        exponent *= 2

    def block(scope: Any) -> None:
        caplog.clear()
        pow(3, exponent)
        end = time.monotonic() + 20
        while not messages(caplog, "stalled") and time.monotonic() < end:
            time.sleep(0.01)

    serve(caplog, loop, block, get(b"/power"))
    (began,) = messages(caplog, "is stalled")
    assert " by GET '/power': " in began
    assert " in block" in began or " in messages" in began
    assert "no thread could run" in began
    assert len(messages(caplog, "was stalled")) == 1


@pytest.mark.parametrize("loop", LOOPS)
def test_work_within_a_library(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    """The line of the application comes first, then where it stands."""
    queue_end = threading.Event()

    def block(scope: Any) -> None:
        threading.Thread(target=let_go).start()
        queue_end.wait(20)

    def let_go() -> None:
        block_until_told(caplog)
        queue_end.set()

    serve(caplog, loop, block, get(b"/wait"))
    began = told(caplog)
    own, _, inner = began.partition(", within it ")
    assert f"{HERE}:" in own
    assert own.endswith(" in block")
    assert "threading.py:" in inner
    assert inner.endswith(" in wait")


def test_a_websocket(caplog: pytest.LogCaptureFixture) -> None:
    head = b"GET /ws HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    head += b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    serve(caplog, "asyncio", lambda scope: block_until_told(caplog), head)
    assert " by GET '/ws': " in messages(caplog, "is stalled")[0]


def test_a_task_of_the_application(caplog: pytest.LogCaptureFixture) -> None:
    async def in_background() -> None:
        block_until_told(caplog)

    serve(caplog, "asyncio", lambda scope: asyncio.ensure_future(in_background()), get(b"/"))
    began = told(caplog)
    assert "by the task test_a_task_of_the_application.<locals>.in_background: " in began


def test_a_callback(caplog: pytest.LogCaptureFixture) -> None:
    def block(scope: Any) -> None:
        asyncio.get_running_loop().call_soon(block_until_told, caplog)

    serve(caplog, "asyncio", block, get(b"/"))
    assert " by a callback: " in messages(caplog, "is stalled")[0]


def test_two_stalls_are_two_pairs(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    def block(scope: Any) -> None:
        block_until_told(caplog)
        seen.append(told(caplog))

    serve(caplog, "asyncio", block, get(b"/1"), get(b"/2"))
    assert [line.split("'")[1] for line in seen] == ["/1", "/2"]


def test_no_thread_without_a_limit_and_none_after_the_end() -> None:
    def threads() -> int:
        return sum(it.name == "leanserve-watchdog" for it in threading.enumerate())

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    async def main(limit: float | None, expected: int) -> None:
        async with serving(app, lifespan="off", stall_limit=limit):
            assert threads() == expected
        for _ in range(200):
            if not threads():
                break
            await asyncio.sleep(0.05)
        assert not threads()

    run("asyncio", lambda: main(None, 0))
    run("asyncio", lambda: main(1.0, 1))


# By hand: no clock but the one that is given


class Hand:
    """A watchdog of 1 s that is driven by hand; a beat and a look are due every 0.25 s."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.dog = Watchdog(1.0, set())
        self.dog.loop = asyncio.get_running_loop()
        self.dog._thread_id = threading.get_ident()
        self.caplog = caplog

    def go(self, until: float, *, beats: bool = False, looks: bool = True) -> list[str]:
        """From now on to `until`; what was logged, by its first words."""
        self.caplog.clear()
        now = self.dog._beaten_s if beats else self.dog._looked_s
        while (now := now + 0.25) <= until:
            if beats:
                self.dog.beat(now)
            if looks:
                self.dog.look(now)
        lines = (it.getMessage() for it in self.caplog.records if it.levelno > logging.DEBUG)
        return [" ".join(line.split()[:7]) for line in lines]


def by_hand(test: Callable[[Hand], None]) -> Callable[[pytest.LogCaptureFixture], None]:
    def wrapped(caplog: pytest.LogCaptureFixture) -> None:
        async def main() -> None:
            test(Hand(caplog))

        asyncio.run(main())

    wrapped.__name__ = test.__name__
    return wrapped


@by_hand
def test_a_loop_that_beats_is_never_stalled(hand: Hand) -> None:
    assert hand.go(100, beats=True) == []


@by_hand
def test_exactly_the_limit_is_no_stall(hand: Hand) -> None:
    assert hand.go(1.25) == []
    hand.dog.beat(1.25)
    assert hand.go(2, beats=True) == []


@by_hand
def test_one_line_while_and_one_behind(hand: Hand) -> None:
    assert hand.go(1.5) == ["the event loop is stalled, 1.2 s"]
    assert hand.go(60) == []
    hand.dog.beat(60)
    hand.dog.look(60.01)
    assert hand.caplog.records[-1].getMessage() == "the event loop was stalled for 59.8 s and goes on"
    assert hand.go(62, beats=True) == []
    hand.dog._looked_s = 62
    assert hand.go(64) == ["the event loop is stalled, 1.2 s"]


@by_hand
def test_one_line_for_what_nobody_could_see(hand: Hand) -> None:
    hand.dog.beat(5)
    hand.dog.look(5)
    (line,) = (it.getMessage() for it in hand.caplog.records)
    assert line.startswith("the event loop was stalled for 4.8 s, unseen (no thread could run: ")
    assert hand.go(8, beats=True) == []


@by_hand
def test_a_look_that_comes_late_says_so(hand: Hand) -> None:
    hand.dog.look(5)
    (line,) = (it.getMessage() for it in hand.caplog.records if it.levelno > logging.DEBUG)
    assert line.startswith("the event loop is stalled, 4.8 s so far, by the task ")
    assert "(no thread could run: " in line
