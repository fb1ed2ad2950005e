"""leanserve.transport.connection: when bytes move and who closes when, with fake time and a fake peer."""

from __future__ import annotations

import asyncio
import gc
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from fakes import FakeService, FakeTransport
from leanserve.errors import RemoteProtocolError
from leanserve.settings import Settings
from leanserve.transport.connection import Connection
from leanserve.transport.phase import Phase
from wire import Response, parse

GET = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode() + body})


async def early(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"early"})


class Held:
    """An application that answers when it is told to."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.sends: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.sends.append(send)
        gate = asyncio.Event()
        self.events.append(gate)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await gate.wait()
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        gate.clear()
        await gate.wait()
        await send({"type": "http.response.body", "body": b"last"})

    def go_on(self) -> None:
        self.events[-1].set()


class Rig:
    """A service with one connection."""

    def __init__(self, app: Any, *, tls: bool = False, kernel_bytes: int = 65536, **flat: Any) -> None:
        self.service = FakeService(app, Settings.build(**flat))
        self.connection: Connection
        self.transport: FakeTransport
        self.connection, self.transport = self.service.connect(tls=tls, kernel_bytes=kernel_bytes)

    @property
    def phase(self) -> Phase:
        return self.connection.phase

    def feed(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.transport.feed(piece)
            self.service.loop.run()

    def eof(self) -> None:
        self.transport.feed_eof()
        self.service.loop.run()

    def pass_time(self, seconds: float) -> None:
        self.service.loop.pass_time(seconds)
        self.service.loop.run()

    def read(self, *methods: bytes) -> list[Response]:
        assert not self.service.failures, self.service.failures
        assert not self.service.loop.problems, self.service.loop.problems
        return parse(self.transport.wire, methods or [b"GET"] * 9, ended=self.transport.sent_eof)


@pytest.fixture(params=[True, False], ids=["fast", "h11"])
def rig(request: pytest.FixtureRequest) -> Iterator[Any]:
    made: list[Rig] = []

    def make(app: Any = echo, **extra: Any) -> Rig:
        made.append(Rig(app, fastpath=request.param, **extra))
        return made[-1]

    yield make
    for it in made:
        assert not it.service.failures, it.service.failures
        it.service.loop.close()


# Requests in order


def test_one_request_after_the_other(rig: Any) -> None:
    it = rig()
    for _ in range(3):
        it.feed(GET)
        assert it.phase is Phase.IDLE
    assert [response.body for response in it.read()] == [b"/"] * 3


@pytest.mark.parametrize("cut", range(0, 2 * len(POST + b"hello"), 3))
def test_a_pipelined_pair_at_any_cut(rig: Any, cut: int) -> None:
    it = rig()
    both = (POST + b"hello") * 2
    it.feed(both[:cut], both[cut:])
    assert [response.body for response in it.read()] == [b"/hello"] * 2
    assert it.phase is Phase.IDLE


def test_an_announced_body_that_is_too_large_never_reaches_the_application(rig: Any) -> None:
    it = rig(max_body_size=4)
    it.feed(POST.replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\n\r\n"))
    (response,) = it.read()
    assert (response.interim, response.status, response.closes) == ([], 413, True)
    assert not it.service.exchanges
    assert it.phase is Phase.LINGERING


class Listening:
    """An application that answers at once, if it is to, and notes what it receives."""

    def __init__(self, *, answers: bool) -> None:
        self.answers = answers
        self.heard: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.answers:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
        while not self.heard or self.heard[-1]["type"] != "http.disconnect":
            self.heard.append(await receive())


@pytest.mark.parametrize("answers", [False, True])
def test_a_chunked_body_that_grows_too_large(rig: Any, answers: bool) -> None:
    it = rig(app := Listening(answers=answers), max_body_size=4, cancel_on_disconnect=False)
    it.feed(CHUNKED, b"4\r\nabcd\r\n", b"1\r\ne\r\n0\r\n\r\n")
    assert [message["type"] for message in app.heard] == ["http.request", "http.disconnect"]
    assert app.heard[0]["body"] == b"abcd"
    (response,) = it.read(b"POST")
    if answers:
        assert (response.status, response.body, response.complete) == (200, b"part", False)
    else:
        assert (response.status, response.closes) == (413, True)
    assert it.phase is Phase.LINGERING
    (record,) = it.service.records
    assert (record.status, record.cause) == (200 if answers else 413, "bad_request")


SMALL_CHUNKS = b"1\r\na\r\n" * 5000


def run_out(it: Rig) -> None:
    """All turns that 5000 chunks take, and some more."""
    for _ in range(20):
        it.service.loop.run()


def test_many_small_chunks_are_read_in_turns(rig: Any) -> None:
    """One peer does not hold the loop: between two turns others have theirs."""
    it = rig(receive_high_water=10)
    seen: list[int] = []
    resume, early = it.transport.resume_reading, []

    def resume_reading() -> None:
        early.append(it.connection.yielded)
        resume()

    it.transport.resume_reading = resume_reading
    it.transport.feed(CHUNKED + SMALL_CHUNKS + b"0\r\n\r\n" + GET)
    (exchange,) = it.service.exchanges

    def look() -> None:
        seen.append(exchange.received_bytes)
        if seen[-1] < 5000:
            it.service.loop.call_soon(look)
            assert not it.transport.is_reading()  # what else is sent waits in the kernel

    look()
    run_out(it)
    assert max(after - before for before, after in itertools.pairwise(seen)) <= 100
    assert early  # the application has received meanwhile
    assert not any(early)
    assert [response.body for response in it.read()] == [b"/" + b"a" * 5000, b"/"]
    assert it.transport.is_reading()


def test_turns_do_not_read_on_for_who_does_not_receive(rig: Any) -> None:
    it = rig(Held(), receive_high_water=1000)
    it.feed(CHUNKED + SMALL_CHUNKS)
    run_out(it)
    assert not it.connection.yielded
    assert not it.transport.is_reading()
    it.feed(SMALL_CHUNKS)
    run_out(it)
    assert it.service.exchanges[0].received_bytes == 5000


@pytest.mark.parametrize("eof", [False, True])
def test_a_connection_that_ends_between_two_turns(rig: Any, eof: bool) -> None:
    it = rig()
    it.transport.feed(CHUNKED + SMALL_CHUNKS)
    assert it.connection.yielded
    if eof:
        it.eof()
    else:
        it.transport.feed_reset()
    run_out(it)
    assert it.phase is Phase.CLOSED
    assert it.service.exchanges[0].received_bytes <= 5000


def test_a_fault_in_a_later_turn_is_answered(rig: Any) -> None:
    it = rig()
    it.feed(CHUNKED + SMALL_CHUNKS + b"x\r\n")
    run_out(it)
    (response,) = it.read()
    assert response.status == 400
    assert it.transport.is_reading()  # lingering


def test_a_pipelined_request_is_not_looked_at_before_its_turn(rig: Any) -> None:
    it = rig(app := Held())
    it.feed(GET + b"\x00junk\r\n\r\n")
    assert len(it.service.exchanges) == 1
    assert not it.service.refusals
    for _ in range(2):
        app.go_on()
        it.service.loop.run()
    ok, refused = it.read()
    assert (ok.status, ok.body, refused.status) == (200, b"partlast", 400)
    assert it.phase is Phase.LINGERING


def list_writes(it: Any) -> list[bytes]:
    """From now on each write of the connection."""
    writes: list[bytes] = []
    write = it.transport.write

    def note(data: bytes) -> None:
        writes.append(data)
        write(data)

    it.transport.write = note
    return writes


@pytest.fixture
def plain_rig() -> Iterator[Any]:
    made: list[Rig] = []

    def make(app: Any, **extra: Any) -> Rig:
        made.append(Rig(app, **extra))
        return made[-1]

    yield make
    for it in made:
        assert not it.service.failures, it.service.failures
        it.service.loop.close()


async def by_path(scope: Any, receive: Any, send: Any) -> None:
    """/wait answers in a later turn, /fail not at all, /stream in two pieces, /N with N bytes."""
    path = scope["path"]
    if path == "/wait":
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    if path == "/fail":
        raise ValueError("on purpose")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if path == "/stream":
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        path += "b"
    size = path[1:]
    body = b"x" * int(size) if size.isdigit() else path.encode()
    await send({"type": "http.response.body", "body": body})


def get(path: bytes, method: bytes = b"GET") -> bytes:
    return b"%b %b HTTP/1.1\r\nhost: a\r\n\r\n" % (method, path)


@pytest.mark.fastpath
@pytest.mark.parametrize("count", [2, 5, 16])
def test_answers_that_are_ready_at_once_go_out_together(plain_rig: Any, count: int) -> None:
    it = plain_rig(by_path)
    writes = list_writes(it)
    it.feed(b"".join(get(b"/a%d" % number) for number in range(count)), b"")  # twice as many turns
    bodies = [response.body for response in it.read(*[b"GET"] * count)]
    assert bodies == [b"/a%d" % number for number in range(count)]
    assert len(writes) == 1
    it.feed(get(b"/b"))
    assert len(writes) == 2
    assert it.connection.held == b""


@pytest.mark.fastpath
@pytest.mark.parametrize(
    ("paths", "writes"),
    [
        ([b"/a", b"/wait", b"/b"], 2),
        ([b"/a", b"/wait", b"/wait", b"/b"], 3),
        ([b"/wait", b"/a", b"/b"], 1),
        ([b"/a", b"/stream", b"/b"], None),
        ([b"/a", b"/b", b"/fail"], None),
        ([b"/1500", b"/1500", b"/1500", b"/1500"], 2),  # three are more than is held
        ([b"/20000", b"/a", b"/b"], 2),
    ],
)
def test_what_is_kept_back_is_bounded(plain_rig: Any, paths: list[bytes], writes: int | None) -> None:
    """An answer is kept back for the next one, and for nothing else: never beyond the turn of the loop in
    which that application is called, never for one that waits."""
    it = plain_rig(by_path)
    seen = list_writes(it)
    it.transport.feed(b"".join(map(get, paths)))
    for _ in range(30):
        held = it.connection.held
        it.service.loop.turn()
        assert not held or it.connection.held != held
        assert len(held) < 4096
    bodies = [response.body for response in it.read()]
    expected = {b"/stream": b"a/streamb", b"/fail": b"Internal Server Error"}
    assert bodies == [
        b"x" * int(path[1:]) if path[1:].isdigit() else expected.get(path, path) for path in paths
    ]
    assert writes is None or len(seen) == writes


@pytest.mark.fastpath
def test_no_answer_to_a_request_that_may_change_something_is_kept_back(plain_rig: Any) -> None:
    it = plain_rig(by_path)
    writes = list_writes(it)
    it.feed(get(b"/a", b"POST") + get(b"/b", b"DELETE") + get(b"/c") + get(b"/d", b"PUT") + get(b"/e"))
    assert [response.body for response in it.read(b"POST", b"DELETE", b"GET", b"PUT", b"GET")] == [
        b"/a", b"/b", b"/c", b"/d", b"/e",
    ]  # fmt: skip
    assert len(writes) == 4


@pytest.mark.fastpath
def test_where_the_application_computes_for_long_no_answer_waits(
    plain_rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer finds out, and then none is kept back for a while."""
    now = [100.0]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/block":
            now[0] += 0.1
        await by_path(scope, receive, send)

    monkeypatch.setattr("leanserve.transport.connection.monotonic", lambda: now[0])
    it = plain_rig(app)
    writes = list_writes(it)
    it.feed(b"".join(map(get, [b"/a", b"/block", b"/block", b"/b", b"/c"])))
    assert [response.body for response in it.read()] == [b"/a", b"/block", b"/block", b"/b", b"/c"]
    assert [data.count(b"HTTP/1.1") for data in writes] == [2, 1, 1, 1]
    now[0] += 1.0
    it.feed(get(b"/a") + get(b"/b"))
    assert len(writes) == 5
    it.feed(get(b"/a") + get(b"/wait") + get(b"/b"))
    assert [data.count(b"HTTP/1.1") for data in writes[5:]] == [1, 2]


@pytest.mark.parametrize("eof", [False, True])
def test_the_next_request_waits_until_the_answers_before_it_are_read(rig: Any, eof: bool) -> None:
    it = rig(by_path, kernel_bytes=1000)
    it.transport.feed(get(b"/20000") * 50 + get(b"/last"))
    if eof:
        it.transport.feed_eof()
    for _ in range(10):
        it.service.loop.run()
    assert len(it.service.exchanges) == 4
    assert it.transport.get_write_buffer_size() < 65536 + 21_000
    while it.transport.peer_reads(30_000):
        it.service.loop.run()
    bodies = [response.body for response in it.read(*[b"GET"] * 51)]
    assert bodies == [b"x" * 20_000] * 50 + [b"/last"]
    assert it.transport.sent_eof is eof


def test_requests_that_wait_for_their_reader_are_bounded(rig: Any) -> None:
    it = rig(by_path, kernel_bytes=1000)
    it.feed(get(b"/20000") * 10)
    for _ in range(20):
        it.feed(get(b"/20000") * 400)
    assert len(it.service.exchanges) == 4
    assert not it.transport.is_reading()
    assert len(it.connection.codec.buffer) < 65536 + 20_000
    while it.transport.peer_reads(100_000):
        it.service.loop.run()
    assert it.transport.is_reading()
    assert len(it.service.exchanges) == 10 + 400 * 20


@pytest.mark.parametrize(
    ("behind", "status"),
    [(b"\x00junk\r\n\r\n", 400), (get(b"/" + b"a" * 9000), 414), (b"GET / HTTP/3.0\r\n\r\n", 505)],
)
def test_what_is_kept_back_comes_before_a_refusal(rig: Any, behind: bytes, status: int) -> None:
    it = rig(by_path)
    it.feed(get(b"/a") + get(b"/b") + behind)
    first, second, refused = it.read()
    assert (first.body, second.body, refused.status) == (b"/a", b"/b", status)


def test_what_is_kept_back_comes_before_an_interim_response(rig: Any) -> None:
    it = rig(echo)
    it.feed(GET + POST.replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\n\r\n"))
    assert it.transport.wire.endswith(b"HTTP/1.1 100 Continue\r\n\r\n")
    it.feed(b"hello" + GET)
    assert [response.interim for response in it.read(b"GET", b"POST", b"GET")] == [[], [100], []]


LAST = b"GET /c HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize("end", [b"GET / HT", b"\r\n", LAST])
def test_what_is_kept_back_comes_before_an_end(rig: Any, end: bytes) -> None:
    for turns in range(8):
        it = rig(by_path)
        it.transport.feed(get(b"/a") + get(b"/b") + end)
        for _ in range(turns):
            it.service.loop.turn()
        if turns:
            it.transport.feed_eof()
        it.service.loop.run()
        assert [response.body for response in it.read()][:2] == [b"/a", b"/b"]
        assert it.connection.held == b""


def test_pipelined_bytes_are_bounded(rig: Any) -> None:
    it = rig(Held())
    it.feed(GET)
    for _ in range(50):
        it.feed(b"x" * 10_000)
    assert len(it.connection.codec.buffer) <= 65536 + 10_000
    assert not it.transport.is_reading()


def test_an_early_answer_and_the_rest_of_a_small_body(rig: Any) -> None:
    it = rig(early)
    it.feed(POST)
    assert it.phase is Phase.ACTIVE
    assert it.read()[0].complete
    it.feed(b"hel", b"lo" + GET)
    assert [response.body for response in it.read()] == [b"early"] * 2
    assert it.phase is Phase.IDLE


def test_an_early_answer_to_a_large_body_closes(rig: Any) -> None:
    it = rig(early)
    it.feed(POST.replace(b"5", b"70000"))
    assert it.read()[0].closes
    assert it.phase is Phase.LINGERING
    it.feed(b"x" * 70000)  # read and dropped, so that no reset destroys the answer
    assert not it.transport.aborted
    it.eof()
    assert it.phase is Phase.CLOSED


def test_the_rest_of_a_body_that_does_not_come(rig: Any) -> None:
    it = rig(early)
    it.feed(POST)
    it.pass_time(5.1)
    assert it.phase is Phase.LINGERING
    it.pass_time(5.1)
    assert it.phase is Phase.CLOSED


# Ends


def test_half_close_still_gets_its_answer(rig: Any) -> None:
    it = rig(app := Held())
    it.feed(GET)
    it.eof()
    assert it.phase is Phase.ACTIVE
    for _ in range(2):
        app.go_on()
        it.service.loop.run()
    (response,) = it.read()
    assert response.complete
    assert it.phase is Phase.CLOSED


def test_half_close_behind_a_pipelined_pair(rig: Any) -> None:
    it = rig()
    it.transport.feed(GET + GET)
    it.transport.feed_eof()
    it.service.loop.run()
    assert len(it.read()) == 2
    assert it.phase is Phase.CLOSED


def test_half_close_behind_two_pipelined_requests(rig: Any) -> None:
    """Both are answered."""
    it = rig(app := Held())
    it.feed(GET + GET)
    it.transport.feed_eof()
    for _ in range(4):
        it.service.loop.run()
        app.go_on()
    it.service.loop.run()
    assert [response.complete for response in it.read()] == [True, True]
    assert it.phase is Phase.CLOSED


def test_a_refusal_behind_a_late_end_of_a_body_is_sent(rig: Any) -> None:
    """The response is out before the request has ended; what follows in the same read is no request."""
    it = rig(app := Held())
    it.feed(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n")
    for _ in range(2):
        it.service.loop.run()
        app.go_on()
    it.service.loop.run()
    it.feed(b"body" + b"\x00\r\n\r\n")
    it.service.loop.run()
    responses = it.read()
    assert [response.status for response in responses] == [200, 400]
    assert responses[-1].complete
    assert not it.transport.aborted


def test_fin_within_a_body_is_a_disconnect(rig: Any) -> None:
    it = rig()
    it.feed(POST + b"he")
    it.eof()
    assert it.phase is Phase.CLOSED
    assert it.read() == []
    (record,) = it.service.records
    assert (record.cause, record.status) == ("client_gone", 499)
    assert not it.service.running


def test_fin_within_a_head(rig: Any) -> None:
    it = rig()
    it.feed(GET[:10])
    it.eof()
    assert it.phase is Phase.CLOSED
    assert it.read() == []


def test_tls_has_no_half_close(rig: Any) -> None:
    it = rig(Held(), tls=True)
    it.feed(GET)
    it.eof()
    assert it.phase is Phase.CLOSED


CLOSE = b"\r\nconnection: close\r\n\r\n"
SHORT = GET.replace(b"\r\n\r\n", CLOSE)


async def closing(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": b"y" * 5_000})


@pytest.mark.parametrize("data", [SHORT, GET.replace(b"HTTP/1.1", b"HTTP/1.0")])
def test_who_says_close_is_closed_at_once(rig: Any, data: bytes) -> None:
    """RFC 9112 section 9.6: such a client "MUST NOT send further requests on that connection"."""
    it = rig()
    it.feed(data)
    assert it.read()[0].closes
    assert it.phase is Phase.CLOSED
    assert not it.transport.aborted
    assert len(it.service.deadlines) == 0


def test_a_long_answer_is_sent_before_that_close(rig: Any) -> None:
    it = rig(closing, kernel_bytes=1_000, linger_timeout=2)
    it.feed(SHORT)
    assert it.phase is Phase.LINGERING
    for _ in range(9):
        it.pass_time(1.9)
        it.transport.peer_reads(1_000)
    assert it.read()[0].complete
    assert it.phase is Phase.CLOSED
    assert not it.transport.aborted


@pytest.mark.parametrize(
    ("app", "data"),
    [
        pytest.param(echo, SHORT + b"\r\n", id="something came behind it"),
        pytest.param(echo, POST.replace(b"\r\n\r\n", CLOSE) + b"hello", id="a stray CRLF may follow"),
        pytest.param(early, POST.replace(b"\r\n\r\n", CLOSE), id="the body is not all here"),
        pytest.param(closing, GET, id="the application says it"),
    ],
)
def test_any_other_close_is_in_stages(rig: Any, app: Any, data: bytes) -> None:
    """RFC 9112 section 9.6: bytes that come behind must not cost the client its response by a reset."""
    it = rig(app)
    it.feed(data)
    assert it.phase is Phase.LINGERING
    it.feed(b"\r\n")
    it.eof()
    assert it.read()[0].closes
    assert it.phase is Phase.CLOSED


def test_a_reset_before_our_fin_is_no_fault_of_the_application(rig: Any) -> None:
    def not_connected() -> None:
        raise OSError(107, "Transport endpoint is not connected")

    it = rig(closing)
    it.transport.write_eof = not_connected
    it.feed(GET)
    it.service.loop.run()
    assert it.phase is Phase.CLOSED
    assert it.service.failures == []


@pytest.mark.parametrize("exc", [None, ConnectionResetError()])
def test_a_loss_is_told_once(rig: Any, exc: Any) -> None:
    told: list[Any] = []
    it = rig(Held())
    it.feed(GET)
    lost = it.connection.exchange.__class__.connection_lost

    class Counting(it.connection.exchange.__class__):  # type: ignore[misc, name-defined]
        __slots__ = ()

        def connection_lost(self, error: Any) -> None:
            told.append(error)
            lost(self, error)

    it.connection.exchange.__class__ = Counting
    it.transport._force_close(exc)
    it.service.loop.run()
    assert told == [exc]
    assert it.connection.exchange is None
    assert not it.connection.gate.open


# Refusals


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/3.0\r\nhost: a\r\n\r\n", 505),
        (b"GET /" + b"a" * 9000, 414),
        (b"GET / HTTP/1.1\r\na: " + b"b" * 80000, 431),
        (b"\x16\x03\x01\x02\x00\x01", 400),
    ],
)
def test_a_refusal_is_answered_and_closed(rig: Any, data: bytes, status: int) -> None:
    it = rig()
    it.feed(data)
    (response,) = it.read()
    assert response.status == status
    assert response.closes
    assert response.complete
    assert it.phase is Phase.LINGERING
    assert it.transport.sent_eof
    it.feed(GET)
    assert len(it.read()) == 1
    it.eof()
    assert it.phase is Phase.CLOSED
    assert [error.status for error in it.service.refusals] == [status]
    assert not it.service.exchanges


def test_a_body_that_goes_wrong_before_the_answer(rig: Any) -> None:
    it = rig()
    it.feed(CHUNKED, b"zz\r\n")
    assert [response.status for response in it.read()] == [400]
    assert [record.cause for record in it.service.records] == ["bad_request"]
    assert not it.service.running


def test_a_body_that_goes_wrong_behind_the_head_of_the_answer(rig: Any) -> None:
    it = rig(app := Held())
    it.feed(CHUNKED)
    app.go_on()
    it.service.loop.run()
    it.feed(b"zz\r\n")
    (response,) = it.read()
    assert (response.status, response.complete) == (200, False)
    assert it.phase is Phase.LINGERING


def test_a_refused_handshake_carries_its_headers(rig: Any) -> None:
    it = rig()

    def refuse(connection: Any, request: Any) -> Any:
        raise RemoteProtocolError("no", status=426, headers=[(b"upgrade", b"websocket")])

    it.service.open_exchange = refuse
    it.feed(GET)
    (response,) = it.read()
    assert (response.status, response.get(b"upgrade")) == (426, b"websocket")
    assert it.phase is Phase.LINGERING


def test_a_bug_of_ours_costs_one_connection(rig: Any) -> None:
    it = rig()
    it.service.open_exchange = lambda connection, request: 1 / 0
    it.feed(GET)
    assert [type(error) for error in it.service.failures] == [ZeroDivisionError]
    it.service.failures.clear()
    assert it.phase is Phase.CLOSED
    assert it.transport.aborted


# Deadlines


def test_no_first_byte(rig: Any) -> None:
    it = rig(first_byte_timeout=3)
    it.pass_time(2.9)
    assert it.phase is Phase.OPENING
    it.pass_time(0.2)
    assert it.phase is Phase.CLOSED
    assert it.read() == []


def test_a_head_that_trickles_is_answered_408(rig: Any) -> None:
    it = rig(header_timeout=4)
    for byte in GET[:8]:
        it.feed(bytes([byte]))
        it.pass_time(0.49)
    assert it.phase is Phase.OPENING
    it.pass_time(0.2)
    (response,) = it.read()
    assert (response.status, response.closes) == (408, True)
    it.pass_time(5.1)
    assert it.phase is Phase.CLOSED


def test_a_second_head_has_its_own_time(rig: Any) -> None:
    it = rig(header_timeout=4, keep_alive_timeout=75)
    it.feed(GET[:3])
    it.pass_time(3)
    it.feed(GET[3:])
    it.pass_time(70)
    it.feed(GET[:3])
    it.pass_time(3.9)
    assert it.phase is Phase.IDLE
    it.pass_time(0.2)
    assert [response.status for response in it.read()] == [200, 408]


def test_idle(rig: Any) -> None:
    it = rig(keep_alive_timeout=7)
    it.feed(GET)
    it.pass_time(6.9)
    it.feed(GET)
    it.pass_time(6.9)
    assert it.phase is Phase.IDLE
    it.pass_time(0.2)
    assert it.phase is Phase.CLOSED
    assert len(it.read()) == 2


def test_no_deadline_runs_while_the_application_works(rig: Any) -> None:
    it = rig(app := Held())
    it.feed(GET)
    it.pass_time(1000)
    assert it.phase is Phase.ACTIVE
    for _ in range(2):
        app.go_on()
        it.service.loop.run()
    assert it.read()[0].complete


def test_lingering_ends(rig: Any) -> None:
    it = rig(linger_timeout=2)
    it.feed(b"\x00")
    assert it.phase is Phase.LINGERING
    it.feed(b"x" * 100_000)
    it.pass_time(2.1)
    assert it.phase is Phase.CLOSED
    assert it.transport.aborted


def test_a_peer_that_takes_a_long_answer_is_not_cut(rig: Any) -> None:
    async def large(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b"y" * 500_000})

    it = rig(large, linger_timeout=2, kernel_bytes=1000)
    it.feed(GET)
    while it.transport.get_write_buffer_size():
        it.transport.peer_reads(100_000)
        it.pass_time(1.9)
        assert not it.transport.aborted
    it.transport.peer_reads()
    assert it.read()[0].complete


def test_a_peer_that_does_not_is_cut(rig: Any) -> None:
    async def large(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b"y" * 500_000})

    it = rig(large, linger_timeout=2, kernel_bytes=1000)
    it.feed(GET)
    it.pass_time(4.1)
    assert it.phase is Phase.CLOSED


# Drain


def test_drain_gives_an_idle_connection_one_more_request(rig: Any) -> None:
    it = rig(drain_idle_timeout=1)
    it.feed(GET)
    it.service.drain()
    it.pass_time(0.9)
    assert it.phase is Phase.IDLE
    it.feed(GET)
    first, second = it.read()
    assert (first.closes, second.closes) == (False, True)
    assert it.phase is Phase.LINGERING
    it.pass_time(1.1)
    assert it.phase is Phase.CLOSED


def test_drain_closes_an_idle_connection_after_a_second(rig: Any) -> None:
    it = rig(drain_idle_timeout=1)
    it.feed(GET)
    it.service.drain()
    it.pass_time(1.1)
    assert it.phase is Phase.CLOSED


def test_drain_before_the_head_of_the_answer(rig: Any) -> None:
    it = rig(app := Held())
    it.feed(GET)
    it.service.drain()
    for _ in range(2):
        app.go_on()
        it.service.loop.run()
    assert it.read()[0].closes
    it.pass_time(1.1)
    assert it.phase is Phase.CLOSED


@pytest.mark.parametrize("again", [False, True])
def test_drain_behind_the_head_of_the_answer(rig: Any, again: bool) -> None:
    """It could not say ``connection: close``; the next request may come, but not in 75 seconds."""
    it = rig(app := Held())
    it.feed(GET)
    app.go_on()
    it.service.loop.run()
    it.service.drain()
    app.go_on()
    it.service.loop.run()
    assert not it.read()[0].closes
    if again:
        it.service.app = early
        it.feed(GET)
        assert it.read()[1].closes
    it.pass_time(1.1)
    if again:
        it.pass_time(1.1)
    assert it.phase is Phase.CLOSED


def test_drain_during_the_rest_of_a_body(rig: Any) -> None:
    it = rig(early)
    it.feed(POST)
    it.service.drain()
    it.feed(b"hello")
    it.pass_time(2.2)
    assert it.phase is Phase.CLOSED


def test_drain_during_a_head(rig: Any) -> None:
    it = rig(drain_idle_timeout=1)
    it.feed(GET[:10])
    it.service.drain()
    it.pass_time(0.5)
    it.feed(GET[10:])
    assert it.read()[0].closes


def test_cancel(rig: Any) -> None:
    it = rig(Held())
    it.feed(GET)
    it.connection.cancel("shutdown")
    it.service.loop.run()
    (response,) = it.read()
    assert (response.status, response.closes, it.service.records[0].cause) == (503, False, "shutdown")
    idle = rig()
    idle.connection.cancel("shutdown")
    idle.service.loop.run()
    assert idle.phase is Phase.CLOSED


# Reading and writing


def test_both_water_marks_are_ours(rig: Any) -> None:
    """uvloop's own low-water mark of 16 bytes makes a sender wait until everything is sent."""
    it = rig(send_high_water=40_000)
    assert it.transport.get_write_buffer_limits() == (10_000, 40_000)


def test_reading_pauses_while_the_application_does_not_receive(rig: Any) -> None:
    it = rig(Held())
    it.feed(POST.replace(b"5", b"5000000"))
    for _ in range(100):
        it.feed(b"x" * 50_000)
    assert not it.transport.is_reading()
    assert len(it.service.exchanges[0].undelivered) <= 65536 + 50_000


def test_a_loss_wakes_a_sender(rig: Any) -> None:
    errors: list[Any] = []

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"y" * 50_000, "more_body": True})
        except OSError as error:
            errors.append(error)

    it = rig(stream, cancel_on_disconnect=False)
    it.feed(GET)
    assert it.service.running
    assert it.transport.get_write_buffer_size() <= 65536 + 50_100
    it.transport.feed_reset()
    it.service.loop.run()
    assert len(errors) == 1
    assert not it.service.running


# Tunnel


class FakeTunnel:
    def __init__(self) -> None:
        self.told: list[Any] = []

    def data_received(self, data: bytes) -> None:
        self.told.append(data)
        if data == b"bad":
            raise RemoteProtocolError("bad", close_code=1002)

    def eof_received(self) -> None:
        self.told.append("eof")

    def connection_lost(self, exc: Exception | None) -> None:
        self.told.append("lost")

    def deadline_reached(self) -> None:
        self.told.append("deadline")

    def drain(self) -> None:
        self.told.append("drain")

    def cancel(self, reason: str) -> None:
        self.told.append(reason)


def tunnel(rig: Any, behind: bytes = b"") -> tuple[Any, FakeTunnel]:
    it, end = rig(Held()), FakeTunnel()
    it.feed(GET + behind)
    rest = it.connection.enter_tunnel(end)
    assert rest == behind
    if rest:
        end.data_received(rest)
    it.service.loop.run()
    return it, end


def test_tunnel_gets_what_came_behind_the_head(rig: Any) -> None:
    it, end = tunnel(rig, b"first")
    it.feed(b"second")
    it.connection.write(b"raw")
    assert end.told == [b"first", b"second"]
    assert it.transport.wire == b"raw"


def test_tunnel_deadline(rig: Any) -> None:
    it, end = tunnel(rig)
    it.connection.set_deadline(3)
    it.pass_time(2)
    it.connection.set_deadline(None)
    it.pass_time(10)
    assert end.told == []
    it.connection.set_deadline(3)
    it.pass_time(3.1)
    it.service.drain()
    it.connection.cancel("shutdown")
    assert end.told == ["deadline", "drain", "shutdown"]


def test_tunnel_end(rig: Any) -> None:
    it, end = tunnel(rig)
    it.eof()
    assert end.told == ["eof", "lost"]
    assert it.phase is Phase.CLOSED


def test_tunnel_that_raises_is_told_once(rig: Any) -> None:
    it, end = tunnel(rig)
    it.feed(b"bad")
    assert end.told == [b"bad", "lost"]
    assert it.phase is Phase.CLOSED


# Memory


def test_a_closed_connection_is_in_nobodys_memory(rig: Any) -> None:
    it = rig(Held())
    gc.collect()
    gc.disable()
    try:
        seen = []
        for _ in range(20):
            connection, transport = it.service.connect()
            transport.feed(GET)
            it.service.loop.run()
            seen.append(weakref.ref(connection))
            transport.feed_reset()
            it.service.loop.run()
            del connection, transport
            it.service.app.sends.clear()
            it.service.app.events.pop().set()
            it.service.exchanges.clear()
            it.service.loop.run()
        assert [ref() for ref in seen if ref() is not None] == []
        assert len(it.service.deadlines) == 1  # of the rig's own connection
    finally:
        gc.enable()


@pytest.mark.parametrize("headers", [[], [(b"content-length", b"%d" % (3 * 100_000))]])
def test_large_pieces_are_written_beside_their_framing(rig: Any, headers: Any) -> None:
    """Joining would copy them; what the peer reads is the same."""
    pieces = [bytes([65 + number]) * 100_000 for number in range(3)]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for piece in pieces:
            more = piece is not pieces[-1]
            await send({"type": "http.response.body", "body": piece, "more_body": more})

    it = rig(app, kernel_bytes=1 << 20)
    it.feed(GET)
    it.service.loop.run()
    (response,) = it.read()
    assert response.body == b"".join(pieces)
    assert response.complete
