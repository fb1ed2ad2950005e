"""A WebSocket whose peer goes: the application is told first, and cancelled when it does not leave."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any

import pytest

from leanserve.errors import ClientDisconnected
from ws_frames import CLOSE, TEXT, close, frame
from ws_session import Session, session

CONNECT, DISCONNECT = "websocket.connect", "websocket.disconnect"
GRACE = 5.0


class Stays:
    """Accepts, then receives until it is told of the end; and stays until it is cancelled."""

    def __init__(self, *, accepts: bool = True, closes: bool = False, swallows: bool = False) -> None:
        self.accepts, self.closes, self.swallows = accepts, closes, swallows
        self.scope: Any = None
        self.told: list[Any] = []
        self.cancels: list[Any] = []
        self.leave: asyncio.Event | None = None
        self.end = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope, self.leave = scope, asyncio.Event()
        assert (await receive())["type"] == CONNECT
        if self.accepts:
            await send({"type": "websocket.accept"})
        if self.closes:
            await send({"type": "websocket.close"})
        while (message := await receive())["type"] != DISCONNECT:
            pass
        self.told.append(message["code"])
        while not self.leave.is_set():
            try:
                await self.leave.wait()
            except asyncio.CancelledError as error:
                self.cancels.append((error.args, self.cause))
                if not self.swallows or not error.args:
                    raise
        self.end = "returned"

    @property
    def cause(self) -> Any:
        return self.scope["extensions"]["leanserve.cancellation"]["cause"]


def over(s: Session) -> None:
    """Nothing is left of the exchange."""
    assert s.exchange.task.done()
    assert s.exchange.grace is None
    assert len(s.service.records) == 1


def silence(s: Session) -> None:
    s.pass_time(10 + 5 + 1.1)  # a ping, its timeout, a last look


def flood(s: Session) -> None:
    s.feed(frame(TEXT, b"\xff"))


def shut(s: Session) -> None:
    s.connection.cancel("shutdown")
    s.settle()


LEAVE: dict[str, tuple[Callable[[Session], None], int, str]] = {
    "reset": (Session.lose, 1006, "client_gone"),
    "eof": (Session.eof, 1006, "client_gone"),
    "close": (lambda s: s.feed(close(1001)), 1001, "client_gone"),
    "silence": (silence, 1011, "client_gone"),
    "violation": (flood, 1007, "bad_request"),
}


@pytest.mark.parametrize("how", LEAVE)
def test_told_first_then_cancelled(how: str) -> None:
    leave, code, cause = LEAVE[how]
    app = Stays()
    with session(app, ws_cancel_grace=GRACE, ws_ping_interval=10, ws_ping_timeout=5) as s:
        s.shake()
        leave(s)
        assert app.told == [code]
        assert app.cause is None
        s.pass_time(GRACE - 0.3)
        assert app.cancels == []
        s.pass_time(0.4)
        assert app.cancels == [((cause,), cause)]
        over(s)


@pytest.mark.parametrize("how", LEAVE)
def test_who_leaves_within_the_grace_is_not_cancelled(how: str) -> None:
    app = Stays()
    with session(app, ws_cancel_grace=GRACE, ws_ping_interval=10, ws_ping_timeout=5) as s:
        s.shake()
        LEAVE[how][0](s)
        s.pass_time(GRACE - 0.3)
        assert app.leave is not None
        app.leave.set()
        s.settle()
        over(s)
        s.pass_time(GRACE)
        assert (app.end, app.cancels) == ("returned", [])
        s.pass_time(60)
        assert len(s.service.deadlines) == 0


@pytest.mark.parametrize("how", LEAVE)
@pytest.mark.parametrize("policy", ["notify", "ignore"])
def test_the_other_policies_only_tell(how: str, policy: str) -> None:
    leave, code, _ = LEAVE[how]
    app = Stays()
    flat = {"disconnect_policy": [f"/ws*={policy}"]}
    with session(app, ws_cancel_grace=GRACE, ws_ping_interval=10, ws_ping_timeout=5, **flat) as s:
        s.shake()
        leave(s)
        s.pass_time(1000)
        assert (app.told, app.cancels, app.cause) == ([code], [], None)


def test_a_policy_of_the_scope_that_comes_before_the_end_counts() -> None:
    app = Stays()
    with session(app, ws_cancel_grace=GRACE) as s:
        s.shake()
        app.scope["extensions"]["leanserve.cancellation"]["policy"] = "notify"
        s.lose()
        s.pass_time(1000)
        assert (app.told, app.cancels) == ([1006], [])


@pytest.mark.parametrize("answered", [False, True])
def test_who_has_closed_by_itself_is_not_cancelled(answered: bool) -> None:
    """What it does behind its own close is its own business, as work behind a complete response is."""
    app = Stays(closes=True)
    with session(app, ws_cancel_grace=GRACE) as s:
        s.shake()
        if answered:
            s.feed(close(1000))
        s.lose()
        s.pass_time(1000)
        assert (app.told, app.cancels) == ([1000], [])


def test_one_who_goes_before_it_is_accepted() -> None:
    app = Stays(accepts=False)
    with session(app, ws_cancel_grace=GRACE) as s:
        s.shake()
        s.lose()
        assert (app.told, app.cancels) == ([1006], [])
        s.pass_time(GRACE + 0.1)
        assert app.cancels == [(("client_gone",), "client_gone")]
        assert (s.record.status, s.record.cause) == (499, "client_gone")


def test_who_swallows_it_is_not_asked_twice() -> None:
    app = Stays(swallows=True)
    with session(app, ws_cancel_grace=GRACE) as s:
        s.shake()
        s.feed(close(1001))  # and the loss of the connection behind it begins no second grace
        s.lose()
        s.pass_time(1000)
        assert len(app.cancels) == 1


@pytest.mark.parametrize("seconds", [0, 0.5])
def test_the_length_of_the_grace(seconds: float) -> None:
    app = Stays()
    with session(app, ws_cancel_grace=seconds) as s:
        s.shake()
        s.lose()
        assert app.told == [1006]
        s.pass_time(seconds + 0.01)
        assert len(app.cancels) == 1


def test_a_slow_reader() -> None:
    """It is cut while the application waits in send(): that raises, and then the grace counts."""
    ends: list[Any] = []

    async def sends(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        try:
            while True:
                await send({"type": "websocket.send", "bytes": bytes(50_000)})
        except ClientDisconnected:
            ends.append("disconnected")
        try:
            ends.append((await receive())["code"])
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            ends.append(error.args)
            raise

    with session(sends, kernel_bytes=1000, send_timeout=20, ws_cancel_grace=GRACE, ws_ping_interval=0) as s:
        s.shake()
        s.pass_time(19)
        assert ends == []
        s.pass_time(2)
        assert ends == ["disconnected", 1006]
        assert s.transport.aborted
        s.pass_time(GRACE)
        assert ends[2:] == [("slow_reader",)]
        assert s.record.cause == "slow_reader"
        over(s)


@pytest.mark.parametrize("policy", ["cancel", "notify", "ignore"])
def test_a_shutdown_has_a_grace_of_its_own(policy: str) -> None:
    """1012 and the disconnect first; then, whatever the policy, half a second."""
    app = Stays()
    with session(app, ws_cancel_grace=GRACE, disconnect_policy=[f"*={policy}"]) as s:
        s.shake()
        shut(s)
        assert s.frames() == [(CLOSE, struct.pack("!H", 1012))]
        assert (app.told, app.cancels) == ([1012], [])
        s.pass_time(0.6)
        assert app.cancels == [(("shutdown",), "shutdown")]
        s.lose()
        assert s.record.cause == "shutdown"


def test_a_shutdown_shortens_a_grace_that_has_begun() -> None:
    app = Stays()
    with session(app, ws_cancel_grace=GRACE) as s:
        s.shake()
        s.lose()
        s.pass_time(1)
        s.exchange.cancel("shutdown")
        s.pass_time(0.6)
        assert app.cancels == [(("shutdown",), "shutdown")]


def test_a_shutdown_behind_most_of_a_grace_does_not_lengthen_it() -> None:
    app = Stays()
    with session(app, ws_cancel_grace=GRACE) as s:
        s.shake()
        s.lose()
        s.pass_time(GRACE - 0.2)
        s.exchange.cancel("shutdown")
        s.pass_time(0.3)
        assert app.cancels == [(("client_gone",), "client_gone")]


def test_messages_that_came_in_time_are_received_within_the_grace() -> None:
    got: list[Any] = []
    go_on = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await go_on.wait()
        while (message := await receive())["type"] != DISCONNECT:
            got.append(message["text"])
        got.append("end")

    with session(slow, ws_cancel_grace=GRACE) as s:
        s.shake()
        s.feed(frame(TEXT, b"a") + frame(TEXT, b"b"))
        s.lose()
        s.pass_time(1)
        go_on.set()
        s.settle()
        assert got == ["a", "b", "end"]
        over(s)
