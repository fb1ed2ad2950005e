"""leanserve.asgi.timer: how long a request may take, with fake time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from fakes import FakeService, FakeTransport
from leanserve.asgi.timer import find_timeout
from leanserve.errors import ClientDisconnected
from leanserve.protocol.events import Request
from leanserve.settings import Settings
from leanserve.transport.connection import Connection
from wire import Response, parse

GET = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n"
START = {"type": "http.response.start", "status": 200, "headers": []}
EVENTS = {**START, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}


def asks(seconds: str, field: str = "Request-Timeout") -> bytes:
    return f"GET / HTTP/1.1\r\nhost: a\r\n{field}: {seconds}\r\n\r\n".encode()


def part(data: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


class Paced:
    """Sends what it is told to, message by message; a number is seconds of fake time to wait before it."""

    def __init__(self, *steps: Any) -> None:
        self.steps = steps
        self.end: Any = None
        self.scopes: list[Any] = []
        self.rig: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        try:
            for step in self.steps:
                if isinstance(step, dict):
                    await send(step)
                else:
                    waiter = asyncio.get_running_loop().create_future()
                    loop = self.rig.service.loop
                    loop.call_at(
                        loop.time() + step, lambda waiter=waiter: waiter.done() or waiter.set_result(None)
                    )
                    await waiter
            self.end = "returned"
        except asyncio.CancelledError as error:
            self.end = error.args
            raise
        except ClientDisconnected:
            self.end = "disconnected"


class Rig:
    def __init__(self, app: Any, fast: bool, kernel_bytes: int = 1 << 20, **flat: Any) -> None:
        app.rig = self
        self.service = FakeService(app, Settings.build(fastpath=fast, **flat))
        self.connection: Connection
        self.transport: FakeTransport
        self.connection, self.transport = self.service.connect(kernel_bytes=kernel_bytes)

    def ask(self, data: bytes) -> None:
        self.transport.feed(data)
        self.service.loop.run()

    def wait(self, seconds: float) -> None:
        self.service.loop.pass_time(seconds)
        self.service.loop.run()

    def answers(self) -> list[Response]:
        return parse(self.transport.wire, [b"GET"] * 9, ended=self.transport.sent_eof)


@pytest.fixture(params=[True, False], ids=["fast", "h11"])
def rig(request: pytest.FixtureRequest) -> Iterator[Any]:
    made: list[Rig] = []

    def make(app: Any, **flat: Any) -> Rig:
        made.append(Rig(app, request.param, **flat))
        return made[-1]

    yield make
    for it in made:
        it.service.loop.run()
        assert not it.service.failures, it.service.failures
        it.service.loop.close()
        assert not it.service.running
        assert not it.service.loop.problems
        assert [exchange.timer for exchange in it.service.exchanges if exchange.timer] == []


@pytest.mark.parametrize("head", [(), (START,)])
def test_504_while_nothing_is_sent(rig: Any, head: Any) -> None:
    app = Paced(*head, 100)
    it = rig(app, request_timeout=5)
    it.ask(GET)
    assert app.scopes[0]["extensions"]["leanserve.cancellation"]["timeout"] == 5
    it.wait(4.9)
    assert it.answers() == []
    it.wait(0.2)
    (answer,) = it.answers()
    assert (answer.status, answer.body) == (504, b"Gateway Timeout")
    assert app.end == ("deadline",)
    assert app.scopes[0]["extensions"]["leanserve.cancellation"]["cause"] == "deadline"
    assert [(record.status, record.cause) for record in it.service.records] == [(504, "deadline")]


def test_the_connection_lives_on_behind_a_504(rig: Any) -> None:
    it = rig(Paced(100), request_timeout=5)
    it.ask(GET)
    it.wait(5.1)
    it.ask(GET)
    it.wait(5.1)
    assert [answer.status for answer in it.answers()] == [504, 504]


def test_cut_when_the_response_has_begun(rig: Any) -> None:
    app = Paced(START, part(b"one"), 100)
    it = rig(app, request_timeout=5)
    it.ask(GET)
    it.wait(5.1)
    (answer,) = it.answers()
    assert not answer.complete
    assert it.transport.sent_eof
    assert app.end == ("deadline",)


def test_in_time(rig: Any) -> None:
    app = Paced(4, START, part(b"one"), 0.9, part(b"two", more=False), 10)
    it = rig(app, request_timeout=5)
    it.ask(GET)
    it.wait(20)
    assert (app.end, it.answers()[0].body) == ("returned", b"onetwo")  # work behind the response has no limit
    assert it.service.loop.armed <= 1


def test_counted_from_the_complete_request(rig: Any) -> None:
    app = Paced(100)
    it = rig(app, request_timeout=5)
    it.ask(POST + b"ab")
    it.wait(10)
    it.ask(b"cd")
    it.wait(4.9)
    assert it.answers() == []
    it.wait(0.2)
    assert it.answers()[0].status == 504


class Slow:
    """Takes one message of the body, waits, takes the rest and answers."""

    def __init__(self, *pauses: float) -> None:
        self.pauses = pauses
        self.end: Any = None
        self.rig: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        loop = self.rig.service.loop
        try:
            for pause in self.pauses:
                waiter = asyncio.get_running_loop().create_future()
                loop.call_at(loop.time() + pause, lambda it=waiter: it.done() or it.set_result(None))
                await waiter
                if not (await receive()).get("more_body"):
                    break
            await send(START)
            await send(part(b"end", more=False))
            self.end = "returned"
        except asyncio.CancelledError as error:
            self.end = error.args
            raise


LARGE = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 210000\r\n\r\n"
EXPECTS = POST.replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\n\r\n")


@pytest.mark.parametrize("limit", ["request_timeout", "response_start_timeout"])
@pytest.mark.parametrize("data", [LARGE + b"x" * 70_000, EXPECTS], ids=["large", "expects"])
def test_a_body_that_is_left_unread_gives_no_time(rig: Any, data: bytes, limit: str) -> None:
    """Then it is the application that keeps the client waiting, and not the other way round."""
    app = Slow(100)
    it = rig(app, **{limit: 5})
    it.ask(data)
    it.wait(4.9)
    assert it.answers() == []
    it.wait(0.2)
    assert it.answers()[0].status == 504
    assert app.end == ("deadline",)


def test_a_body_that_is_read_slowly_is_read(rig: Any) -> None:
    """What counts is the time of one pause, and behind the end of the request that of the response."""
    app = Slow(4, 4, 4)
    it = rig(app, request_timeout=5)
    it.ask(LARGE + b"x" * 70_000)
    for _ in range(2):
        it.wait(4)
        it.ask(b"x" * 70_000)
    it.wait(4)
    assert app.end == "returned"
    assert [answer.status for answer in it.answers()] == [200]


def test_who_waits_for_the_body_that_it_has_asked_for_has_all_the_time(rig: Any) -> None:
    app = Slow(4, 0.1, 0.1)
    it = rig(app, request_timeout=5, body_timeout=60)
    it.ask(EXPECTS)
    it.wait(30)
    it.ask(b"abcd")
    it.wait(1)
    assert app.end == "returned"


@pytest.mark.parametrize(
    ("field", "flat"), [("Request-Timeout", {}), ("X-Wait", {"request_timeout_header": "x-wait"})]
)
def test_what_a_client_asks_for(rig: Any, field: str, flat: dict[str, Any]) -> None:
    app = Paced(100)
    it = rig(app, **flat)
    it.ask(asks("2.5", field))
    it.wait(2.6)
    assert it.answers()[0].status == 504
    assert app.end == ("deadline",)


@pytest.mark.parametrize("seconds", ["0", "-1"])
def test_no_time_left_is_refused_before_it_starts(rig: Any, seconds: str) -> None:
    app = Paced()
    it = rig(app)
    it.ask(asks(seconds))
    assert [answer.status for answer in it.answers()] == [504]
    assert app.scopes == []


@pytest.mark.parametrize(
    ("value", "allowed", "found"),
    [
        (b"2", None, 2), (b"2", 1.0, 1), (b"2", 3.0, 2), (b"", 3.0, 3), (b"soon", None, None),
        (b"nan", None, None),
        (b"inf", 3.0, 3), (b"1e0", None, 1), (b"5s", 3.0, 3),
    ],
)  # fmt: skip
def test_find_timeout(value: bytes, allowed: float | None, found: float | None) -> None:
    request = Request(b"GET", b"/", b"", "1.1", [(b"host", b"a"), (b"request-timeout", value)])
    assert find_timeout(request, Settings.build(request_timeout=allowed).request) == found
    assert find_timeout(request, Settings.build(request_timeout_header=None).request) is None


def test_first_byte(rig: Any) -> None:
    app = Paced(START, 3, part(b"one"), 3, part(b"two"), 3, part(b"", more=False))
    it = rig(app, response_start_timeout=4)
    it.ask(GET)
    it.wait(20)
    assert app.end == "returned"
    late = Paced(START, 5, part(b"one"))
    it = rig(late, response_start_timeout=4)
    it.ask(GET)
    it.wait(4.1)
    assert it.answers()[0].status == 504
    assert late.end == ("deadline",)


def test_gap(rig: Any) -> None:
    app = Paced(30, START, part(b"one"), 3, part(b"two"), 3, part(b"three"), 5, part(b"four"))
    it = rig(app, response_gap_timeout=4)
    it.ask(GET)
    it.wait(30 + 9.9)
    assert app.end is None
    it.wait(0.2)
    assert app.end == ("deadline",)
    (answer,) = it.answers()
    assert (answer.complete, answer.body) == (False, b"onetwothree")


def test_a_slow_client_is_not_a_gap(rig: Any) -> None:
    app = Paced(START, part(b"x" * 300_000), part(b"end", more=False))
    it = rig(app, response_gap_timeout=4, send_timeout=None, kernel_bytes=1000)
    it.ask(GET)
    it.wait(20)
    assert app.end is None
    it.transport.peer_reads()
    it.service.loop.run()
    assert app.end == "returned"


def test_time_from_the_clients_reading_is_the_applications(rig: Any) -> None:
    """The gap begins when the client has made room, not when the application asked for it."""
    app = Paced(START, part(b"x" * 300_000), 3, part(b"end", more=False))
    it = rig(app, response_gap_timeout=4, send_timeout=None, kernel_bytes=1000)
    it.ask(GET)
    it.wait(7.9)
    it.transport.peer_reads()
    it.wait(2.9)
    assert app.end is None
    it.wait(0.2)
    assert app.end == "returned"


def test_behind_a_slow_client_a_gap_is_one_again(rig: Any) -> None:
    app = Paced(START, part(b"x" * 300_000), 100)
    it = rig(app, response_gap_timeout=4, send_timeout=None, kernel_bytes=1000)
    it.ask(GET)
    it.wait(60)
    it.transport.peer_reads()
    it.service.loop.run()
    it.wait(3.9)
    assert app.end is None
    it.wait(0.2)
    assert app.end == ("deadline",)


def test_a_response_ahead_of_the_end_of_its_request_has_begun_in_time(rig: Any) -> None:
    app = Paced(START, part(b"one"), 9, part(b"two", more=False))
    it = rig(app, response_start_timeout=4)
    it.ask(POST + b"ab")
    it.wait(2)
    it.ask(b"cd")
    it.wait(8)
    assert app.end == "returned"
    assert it.answers()[0].complete


@pytest.mark.parametrize("begun", [False, True])
def test_who_ignores_its_client_may_answer_nobody_in_time(rig: Any, begun: bool) -> None:
    """The limits of the first byte and of a gap know what was said to nobody."""
    steps = [3, part(b"one"), 3, part(b"two"), 3, part(b"", more=False), 10]
    app = Paced(*([START, part(b"zero"), *steps] if begun else [2, START, *steps]))
    it = rig(app, disconnect_policy=["/*=ignore"], response_start_timeout=6, response_gap_timeout=4)
    it.ask(GET)
    it.wait(1)
    it.transport.feed_reset()
    it.wait(60)
    assert app.end == "returned"


@pytest.mark.parametrize("steps", [[10, START], [START, part(b""), 3, part(b""), 10]])
def test_who_ignores_its_client_and_says_nothing(rig: Any, steps: list[Any]) -> None:
    app = Paced(*steps)
    it = rig(app, disconnect_policy=["/*=ignore"], response_start_timeout=6, response_gap_timeout=4)
    it.ask(GET)
    it.wait(1)
    it.transport.feed_reset()
    it.wait(8)
    assert app.end == ("deadline",)


def test_who_ignores_its_client_does_not_hear_that_it_left_within_send(rig: Any) -> None:
    app = Paced(START, part(b"x" * 300_000), 1, part(b"y"), part(b"end", more=False))
    it = rig(app, disconnect_policy=["/*=ignore"], kernel_bytes=1000)
    it.ask(GET)
    assert not it.connection.gate.open
    it.transport.feed_reset()
    it.wait(2)
    assert app.end == "returned"


def test_who_ignores_its_client_has_limits_all_the_same(rig: Any) -> None:
    app = Paced(100)
    it = rig(app, disconnect_policy=["/*=ignore"], request_timeout=5)
    it.ask(GET)
    it.transport.feed_reset()
    it.service.loop.run()
    assert app.end is None
    it.wait(5.1)
    assert app.end == ("deadline",)


@pytest.mark.parametrize(
    ("first", "comments"), [(b"data: 1\n\n", 3), (b"data: 1\n", 3), (b"data: 1", 0), (b"data: 1\r", 0)]
)
def test_comments_in_a_silent_event_stream(rig: Any, first: bytes, comments: int) -> None:
    app = Paced(EVENTS, part(first), 35, part(b"data: 2\n\n", more=False))
    it = rig(app, sse_comment_interval=10)
    it.ask(GET)
    it.wait(36)
    (answer,) = it.answers()
    assert answer.body == first + b":\n" * comments + b"data: 2\n\n"
    assert app.end == "returned"


def test_comments_wait_for_silence(rig: Any) -> None:
    app = Paced(
        EVENTS, *[step for _ in range(4) for step in (9, part(b"data: 1\n\n"))], part(b"", more=False)
    )
    it = rig(app, sse_comment_interval=10)
    it.ask(GET)
    it.wait(50)
    assert it.answers()[0].body == b"data: 1\n\n" * 4


@pytest.mark.parametrize(
    "head",
    [
        START,
        {**START, "headers": [(b"content-type", b"text/plain")]},
        {**EVENTS, "headers": [*EVENTS["headers"], (b"content-encoding", b"gzip")]},  # type: ignore[misc]
        {**EVENTS, "headers": [*EVENTS["headers"], (b"content-length", b"18")]},  # type: ignore[misc]
    ],
)
def test_no_comments_elsewhere(rig: Any, head: dict[str, Any]) -> None:
    app = Paced(head, part(b"data: 1\n\n"), 35, part(b"data: 2\n\n", more=False))
    it = rig(app, sse_comment_interval=10)
    it.ask(GET)
    it.wait(36)
    assert it.answers()[0].body == b"data: 1\n\ndata: 2\n\n"


def test_a_comment_is_no_sign_of_life_of_the_application(rig: Any) -> None:
    app = Paced(EVENTS, part(b"data: 1\n\n"), 100)
    it = rig(app, sse_comment_interval=1, response_gap_timeout=5)
    it.ask(GET)
    it.wait(5.1)
    assert app.end == ("deadline",)


@pytest.mark.parametrize("flat", [{}, {"request_timeout_header": None}])
def test_no_limit_no_timer(rig: Any, flat: dict[str, Any]) -> None:
    app = Paced(1)
    it = rig(app, **flat)
    it.ask(GET)
    assert it.service.exchanges[0].timer is None
    it.wait(2)
