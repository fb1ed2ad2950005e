"""One connection under everything that can happen to it, in any order."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from fakes import FakeService, FakeTransport
from leanserve.asgi.states import ResponseState
from leanserve.errors import AppProtocolError, ClientDisconnected
from leanserve.settings import Settings
from leanserve.transport.connection import Connection
from leanserve.transport.deadlines import NEVER
from leanserve.transport.phase import Phase, Wait
from wire import Response, parse

GET = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nhost: a\r\n"
REQUESTS = {
    "get": (b"GET", GET),
    "head": (b"HEAD", GET.replace(b"GET", b"HEAD")),
    "close": (b"GET", b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"),
    "old": (b"GET", b"GET / HTTP/1.0\r\n\r\n"),
    "kept": (b"GET", b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n"),
    "post": (b"POST", POST + b"content-length: 5\r\n\r\nhello"),
    "waits": (b"POST", POST + b"content-length: 5\r\nexpect: 100-continue\r\n\r\nhello"),
    "chunked": (b"POST", POST + b"te: trailers\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    "large": (b"POST", POST + b"content-length: 300000\r\n\r\n" + b"x" * 300000),
    "pair": (b"GET", GET),
    "junk": (b"GET", b"\x00\x01\x02\r\n\r\n"),
    "asks": (b"GET", GET.replace(b"\r\n\r\n", b"\r\nrequest-timeout: 2\r\n\r\n")),
    "asks too much": (b"GET", GET.replace(b"\r\n\r\n", b"\r\nrequest-timeout: 0\r\n\r\n")),
    "badchunk": (b"POST", POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n"),
}  # fmt: skip

START = {"type": "http.response.start", "status": 200, "headers": []}
SENDS: dict[str, dict[str, Any]] = {
    "start": START,
    "start 204": {**START, "status": 204},
    "start length 3": {**START, "headers": [(b"content-length", b"3")]},
    "start close": {**START, "headers": [(b"connection", b"close")]},
    "start events": {**START, "headers": [(b"content-type", b"text/event-stream")]},
    "start trailers": {**START, "trailers": True},
    "start bad": {**START, "headers": [(b"a", b"b\r\nc: d")]},
    "start twice the length": {**START, "headers": [(b"content-length", b"3"), (b"content-length", b"4")]},
    "part": {"type": "http.response.body", "body": b"abc", "more_body": True},
    "big part": {"type": "http.response.body", "body": b"y" * 200_000, "more_body": True},
    "line": {"type": "http.response.body", "body": b"data: 1\n", "more_body": True},
    "empty part": {"type": "http.response.body", "more_body": True},
    "last": {"type": "http.response.body", "body": b"abc"},
    "empty last": {"type": "http.response.body"},
    "trailers": {"type": "http.response.trailers", "headers": [(b"x-t", b"1")]},
    "hint": {"type": "http.response.early_hint", "links": [b"</a>; rel=preload"]},
    "path": {"type": "http.response.pathsend", "path": "relative"},
    "nonsense": {"type": "websocket.send"},
}
CAUSES = ("client_gone", "slow_reader", "bad_request")
ANSWERS = ("last", "empty last", "part", "big part")
DOES = ("receive", "raise", "return", "cancel", "notify", "ignore")
PEER = ("half", "rest", "eof", "reset", "reads", "reads a little")
TIMES = {"a moment": 0.05, "a second": 1, "ten seconds": 10, "two minutes": 120}
SERVER = ("drain", *TIMES)

STEP = st.one_of(
    st.tuples(st.just("begin"), st.sampled_from(sorted(REQUESTS))),
    st.tuples(st.just("request"), st.sampled_from(sorted(REQUESTS))),
    st.tuples(st.just("send"), st.sampled_from(sorted(SENDS))),
    st.tuples(st.just("answer"), st.sampled_from(ANSWERS)),
    st.tuples(st.just("app"), st.sampled_from(DOES)),
    st.tuples(st.just("peer"), st.sampled_from(PEER)),
    st.tuples(st.just("server"), st.sampled_from(SERVER)),
    st.tuples(st.just("turn"), st.just("")),
)


class Bench:
    """One connection, with an application that does what it is told."""

    def __init__(self, *, tls: bool, fast: bool, stays: bool = False, **flat: Any) -> None:
        self.stays = stays  # an application that catches its cancellation, and goes on
        self.cancels: list[list[tuple[Any, str, Any]]] = []  # of each: message, policy and cause in the scope
        self.orders: list[asyncio.Queue[Any]] = []
        self.surprises: list[BaseException] = []
        self.methods: list[bytes] = []
        self.half = b""
        self.service = FakeService(self.app, Settings.build(linger_timeout=2.0, fastpath=fast, **flat))
        self.connection: Connection
        self.transport: FakeTransport
        self.connection, self.transport = self.service.connect(tls=tls)
        self.losses: dict[int, int] = {}
        self.dones: dict[int, int] = {}

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        orders: asyncio.Queue[Any] = asyncio.Queue()
        self.orders.append(orders)
        waiting: set[asyncio.Task[Any]] = set()
        cancels: list[tuple[Any, str, Any]] = []
        self.cancels.append(cancels)
        told = scope["extensions"]["leanserve.cancellation"]
        try:
            while True:
                try:
                    order = await orders.get()
                except asyncio.CancelledError as error:
                    cancels.append((error.args[:1], told["policy"], told["cause"]))
                    if self.stays and error.args:
                        continue
                    raise
                if order == "return":
                    break
                if order == "raise":
                    raise ValueError("told to")
                if order in ("cancel", "notify", "ignore"):
                    told["policy"] = order
                    continue
                call = receive() if order == "receive" else send(order)
                task = asyncio.ensure_future(call)
                waiting.add(task)
                task.add_done_callback(self.judge)
                await asyncio.sleep(0)
        finally:
            for task in waiting:
                task.cancel()

    def judge(self, task: asyncio.Task[Any]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, (AppProtocolError, ClientDisconnected)):
            self.surprises.append(error)

    # Steps

    def step(self, kind: str, what: str) -> None:
        if kind == "request":
            method, data = REQUESTS[what]
            self.methods += [method, method] if what == "pair" else [method]
            self.half += data * 2 if what == "pair" else data
            self.peer("rest" if what != "pair" else "half")
            self.service.loop.run()
        elif kind == "send" and self.orders:
            self.orders[-1].put_nowait(dict(SENDS[what]))
        elif kind == "answer" and self.orders:
            self.orders[-1].put_nowait(dict(SENDS["start"]))
            self.orders[-1].put_nowait(dict(SENDS[what]))
            self.service.loop.run()
        elif kind == "app" and self.orders:
            self.orders[-1].put_nowait(what)
        elif kind == "peer":
            self.peer(what)
        elif kind == "begin":
            method, data = REQUESTS[what]
            self.methods.append(method)
            self.half += data
        elif kind == "server":
            self.server(what)
        elif kind == "turn":
            self.service.loop.run()
        self.check()

    def peer(self, what: str) -> None:
        if self.transport.lost or self.transport._waiting_eof:
            if what.startswith("reads"):
                self.transport.peer_reads(None if what == "reads" else 1000)
            return
        if what == "half":
            size = len(self.half) // 2
            self.transport.feed(self.half[:size])
            self.half = self.half[size:]
        elif what == "rest":
            self.transport.feed(self.half)
            self.half = b""
        elif what == "eof":
            self.transport.feed_eof()
        elif what == "reset":
            self.transport.feed_reset()
        else:
            self.transport.peer_reads(None if what == "reads" else 1000)

    def server(self, what: str) -> None:
        if what == "drain":
            self.service.drain()
        else:
            self.service.loop.pass_time(TIMES[what])

    # What has to hold

    def check(self) -> list[Response]:
        assert not self.service.failures, self.service.failures
        assert not self.surprises, self.surprises
        assert not self.service.loop.problems, self.service.loop.problems
        assert len(self.service.records) <= len(self.service.exchanges)
        for cancels in self.cancels:
            assert len(cancels) <= 1, cancels  # who goes on is not asked twice
            for message, policy, cause in cancels:
                assert message == (cause,)
                assert cause == "deadline" or (policy == "cancel" and cause in CAUSES), (policy, cause)
        self.check_deadline()
        begun = [exchange.request.method for exchange in self.service.exchanges]
        # One more: a refusal of what never became an exchange.
        return parse(self.transport.wire, begun if not self.service.refusals else [*begun, b"GET"])

    def check_deadline(self) -> None:
        """Row 43 of docs/reference/demands.md: the idle timer runs while the connection is idle, and no other
        time; nothing limits the application behind a complete request."""
        connection = self.connection
        runs = connection.deadline != NEVER
        if connection.phase is Phase.IDLE and connection.codec.buffer and connection.gate.full:
            assert not runs, connection  # a request that waits for its peer to read, who has a deadline
        elif connection.phase in (Phase.OPENING, Phase.IDLE, Phase.LINGERING):
            assert runs or connection.transport.is_closing(), connection
        elif connection.phase in (Phase.ACTIVE, Phase.LAST) and connection.codec.request_ended:
            assert not runs or connection.waits_for is Wait.PROBE, (connection, connection.waits_for)
        if runs and connection.waits_for is Wait.NEXT_REQUEST:
            assert connection.phase is Phase.IDLE, connection
        timers = sum(exchange.timer is not None for exchange in self.service.exchanges)
        assert len(self.service.deadlines) <= 2 + timers  # its own, and one for a slow reader

    def end(self) -> None:
        """The application ends; then two deadlines in a row close any connection."""
        for orders in self.orders:
            orders.put_nowait("return")
        for _ in range(20):
            self.service.loop.run()
            for orders in self.orders:
                orders.put_nowait("return")
        self.check()
        running = [exchange for exchange in self.service.running if not exchange.task.done()]
        assert not running, running
        for _ in range(2):
            reader = self.connection.reader_watch
            due = min(self.connection.deadline, NEVER if reader is None else reader.deadline)
            wait = due - self.service.loop.time()
            if self.connection.phase is not Phase.CLOSED:
                assert wait < 100, (self.connection, wait)
                self.service.loop.pass_time(max(wait, 0) + 0.01)
                self.service.loop.run()
        assert self.connection.phase is Phase.CLOSED, self.connection
        assert self.connection not in self.service.connections
        assert len(self.service.deadlines) == 0
        assert len(self.service.records) == len(self.service.exchanges)
        assert [exchange for exchange in self.service.exchanges if exchange.timer is not None] == []
        assert self.connection.reader_watch is None
        for response, exchange in zip(self.check(), self.service.exchanges, strict=False):
            if exchange.response is ResponseState.GONE and response.get(b"transfer-encoding"):
                assert not response.complete, response  # what was cut never looks complete


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEP, max_size=25), st.booleans(), st.booleans())
def test_any_order(steps: list[tuple[str, str]], tls: bool, fast: bool) -> None:
    bench = Bench(tls=tls, fast=fast)
    try:
        for kind, what in steps:
            bench.step(kind, what)
        event(bench.connection.phase.name)
        bench.end()
    finally:
        bench.service.loop.close()


LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "request_timeout": st.sampled_from((0.5, 3.0, 30.0)),
        "response_start_timeout": st.sampled_from((0.5, 3.0)),
        "response_gap_timeout": st.sampled_from((0.5, 3.0)),
        "sse_comment_interval": st.sampled_from((0.4, 3.0)),
        "cancel_on_disconnect": st.booleans(),
        "disconnect_policy": st.sampled_from((["*=ignore"], ["*=notify"], ["/x=ignore"])),
        "half_close": st.sampled_from(("deliver", "disconnect")),
        "send_timeout": st.sampled_from((0.5, 5.0, None)),
        "max_body_size": st.sampled_from((3, 100_000)),
        "body_min_rate": st.sampled_from((0, 10, 100_000)),
    },
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.tuples(st.just("request"), st.sampled_from(sorted(REQUESTS))), st.lists(STEP, min_size=3, max_size=25),
    st.booleans(), st.booleans(), st.booleans(), LIMITS,
)  # fmt: skip
def test_any_order_under_any_limits(
    first: tuple[str, str],
    steps: list[tuple[str, str]],
    tls: bool,
    fast: bool,
    stays: bool,
    limits: dict[str, Any],
) -> None:
    bench = Bench(tls=tls, fast=fast, stays=stays, **limits)
    try:
        for kind, what in [first, *steps]:
            bench.step(kind, what)
        for cause in {record.cause for record in bench.service.records}:
            event(f"cause {cause or 'none'}")
        bench.end()
    finally:
        bench.service.loop.close()
