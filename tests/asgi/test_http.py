"""leanserve.asgi.http: what the application may say, and what the client sees of it."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import pytest

from fakes import FakeService, FakeTransport
from leanserve.asgi.states import (
    BodyMachine,
    BodyMove,
    BodyState,
    ResponseMachine,
    ResponseMove,
    ResponseState,
)
from leanserve.errors import AppProtocolError, ClientDisconnected
from leanserve.settings import Settings
from leanserve.transport.connection import Connection
from leanserve.transport.phase import Phase
from machines import reachable, walk
from wire import Response, parse

GET = b"GET /p%20q?x=1 HTTP/1.1\r\nhost: a\r\n\r\n"
HEAD = GET.replace(b"GET", b"HEAD")
OLD = b"GET / HTTP/1.0\r\n\r\n"
KEPT = b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\n"
EXPECT = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\n"
TRAILERS = b"GET / HTTP/1.1\r\nhost: a\r\nte: trailers\r\n\r\n"

START = {"type": "http.response.start", "status": 200, "headers": []}


def start(status: int = 200, *headers: tuple[bytes, bytes], **extra: Any) -> dict[str, Any]:
    return {**START, "status": status, "headers": headers, **extra}


def body(data: Any = b"", *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


class Script:
    """An application that sends messages, notes what comes of it, and lets no error out unless told to."""

    def __init__(self, *messages: dict[str, Any], reraise: bool = True) -> None:
        self.messages = messages
        self.errors: list[Exception] = []
        self.scopes: list[Any] = []
        self.reraise = reraise

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        for message in self.messages:
            try:
                await send(message)
            except (AppProtocolError, OSError) as error:
                self.errors.append(error)
                if self.reraise:
                    raise


class Rig:
    def __init__(self, app: Any, fast: bool, *, kernel_bytes: int = 1 << 20, **flat: Any) -> None:
        self.service = FakeService(app, Settings.build(fastpath=fast, **flat))
        self.connection: Connection
        self.transport: FakeTransport
        self.connection, self.transport = self.service.connect(kernel_bytes=kernel_bytes)
        self.methods: list[bytes] = []

    def ask(self, *requests: bytes) -> list[Response]:
        for request in requests:
            self.methods.append(request.partition(b" ")[0])
            self.transport.feed(request)
            self.service.loop.run()
        return self.read()

    def read(self) -> list[Response]:
        assert not self.service.loop.problems, self.service.loop.problems
        return parse(self.transport.wire, self.methods, ended=self.transport.sent_eof)

    @property
    def phase(self) -> Phase:
        return self.connection.phase


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
        assert not it.service.loop.problems, it.service.loop.problems
        assert len(it.service.records) == len(it.service.exchanges)


# Machines


def test_every_response_state_and_move() -> None:
    walk(ResponseMachine, ResponseState, ResponseMove)
    assert reachable(ResponseMachine, ResponseState.DONE) <= {ResponseState.DONE}
    assert reachable(ResponseMachine, ResponseState.GONE) <= {ResponseState.GONE}
    assert ResponseState.HELD not in reachable(ResponseMachine, ResponseState.STREAMING)


def test_every_body_state_and_move() -> None:
    walk(BodyMachine, BodyState, BodyMove)
    assert reachable(BodyMachine, BodyState.CUT) == {BodyState.CUT}
    assert all((state, BodyMove.CUT) in BodyMachine.TABLE for state in BodyState)
    assert BodyState.READING not in reachable(BodyMachine, BodyState.ENDED)


# Scope


def test_scope(rig: Any) -> None:
    app = Script(start(), body())
    it = rig(app)
    it.service.state["model"] = model = object()
    it.ask(GET.replace(b"host", b"X-Y:  z \r\nHost"))
    (scope,) = app.scopes
    assert scope == {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.5"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/p q",
        "raw_path": b"/p%20q",
        "query_string": b"x=1",
        "root_path": "",
        "headers": [(b"x-y", b"z"), (b"host", b"a")],
        "client": ("192.0.2.1", 1234),
        "server": ("192.0.2.2", 80),
        "state": {"model": model},
        "extensions": {
            "http.response.trailers": {},
            "http.response.early_hint": {},
            "http.response.pathsend": {},
            "leanserve.cancellation": {"policy": "cancel", "cause": None},
            "leanserve.shutdown": it.service.shutdown,
        },
    }
    scope["state"]["other"] = 1
    scope["extensions"]["mine"] = {}
    scope["asgi"]["mine"] = 1
    it.ask(GET)
    assert "other" not in app.scopes[1]["state"]
    assert "mine" not in app.scopes[1]["extensions"]
    assert "mine" not in app.scopes[1]["asgi"]
    assert app.scopes[1]["state"]["model"] is model


# Framing


@pytest.mark.parametrize("request_", [GET, KEPT])
def test_a_whole_body_has_a_length(rig: Any, request_: bytes) -> None:
    it = rig(Script(start(), body(b"abc")))
    first, second = it.ask(request_, request_)
    for response in (first, second):
        assert (response.get(b"content-length"), response.body) == (b"3", b"abc")
        assert response.get(b"transfer-encoding") is None
    assert it.phase is Phase.IDLE
    assert (first.get(b"connection") == b"keep-alive") is (request_ is KEPT)


def test_a_stream_is_chunked(rig: Any) -> None:
    it = rig(Script(start(), body(b"abc", more=True), body(b"", more=True), body(b"d")))
    (response,) = it.ask(GET)
    assert (response.get(b"transfer-encoding"), response.body, response.complete) == (
        b"chunked",
        b"abcd",
        True,
    )
    assert it.phase is Phase.IDLE


@pytest.mark.parametrize("request_", [OLD, KEPT])
def test_a_stream_to_an_old_client_ends_with_the_connection(rig: Any, request_: bytes) -> None:
    it = rig(Script(start(), body(b"abc", more=True), body(b"d")))
    (response,) = it.ask(request_)
    assert response.get(b"transfer-encoding") is None
    assert response.get(b"content-length") is None
    assert response.closes
    assert (response.body, response.complete) == (b"abcd", True)


def test_a_length_of_the_applications(rig: Any) -> None:
    it = rig(Script(start(200, (b"Content-Length", b"004")), body(b"abc", more=True), body(b"d")))
    for request in (GET, KEPT):
        response = it.ask(request)[-1]
        assert (response.get(b"content-length"), response.body) == (b"4", b"abcd")
    assert it.phase is Phase.IDLE


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize("data", [b"", b"abc"])
def test_statuses_without_content(rig: Any, status: int, data: bytes) -> None:
    it = rig(Script(start(status, (b"content-length", b"3"), (b"etag", b"1")), body(data)))
    first, _ = it.ask(GET, GET)
    assert first.get(b"transfer-encoding") is None
    assert first.get(b"content-length") == (b"3" if status == 304 else None)
    assert it.transport.wire.count(b"abc") == 0
    assert it.service.records[0].sent_bytes == 0


def test_205_has_an_empty_body(rig: Any) -> None:
    it = rig(Script(start(205), body(b"abc")))
    first, _ = it.ask(GET, GET)
    assert (first.get(b"content-length"), first.body, first.get(b"transfer-encoding")) == (b"0", b"", None)


@pytest.mark.parametrize("messages", [[body(b"abc")], [body(b"a", more=True), body(b"bc")], [body()]])
@pytest.mark.parametrize("length", [[], [(b"content-length", b"3")]])
def test_head(rig: Any, messages: list[Any], length: list[Any]) -> None:
    it = rig(Script(start(200, *length), *messages))
    first, _ = it.ask(HEAD, HEAD)
    assert first.complete
    assert b"abc" not in it.transport.wire
    assert not first.closes
    if length:
        assert first.get(b"content-length") == b"3"
    else:
        assert first.get(b"content-length") in (None, b"3")
    assert it.phase is Phase.IDLE
    assert it.service.records[0].sent_bytes == 0


def test_any_status_and_reason(rig: Any) -> None:
    for status in (200, HTTPStatus.IM_A_TEAPOT, 299, 599, 999):
        it = rig(Script(start(status), body()))
        assert it.ask(GET)[0].status == status


@pytest.mark.parametrize("data", [bytearray(b"abc"), memoryview(b"abc")])
def test_kinds_of_bytes(rig: Any, data: Any) -> None:
    assert rig(Script(start(), body(data))).ask(GET)[0].body == b"abc"


def test_app_says_close(rig: Any) -> None:
    it = rig(Script(start(200, (b"Connection", b"Close")), body(b"abc")))
    (response,) = it.ask(GET)
    assert response.closes
    assert it.phase is Phase.LINGERING


def test_app_says_chunked(rig: Any) -> None:
    it = rig(Script(start(200, (b"transfer-encoding", b"chunked")), body(b"abc", more=True), body(b"")))
    (response,) = it.ask(GET)
    assert response.body == b"abc"


def test_defaults_do_not_overrule_the_application(rig: Any) -> None:
    it = rig(Script(start(200, (b"Server", b"mine")), body()))
    assert it.ask(GET)[0].get(b"server") == b"mine"
    assert rig(Script(start(), body())).ask(GET)[0].get(b"server") == b"fake"


def test_headers_keep_order_and_repeats(rig: Any) -> None:
    cookies = [(b"set-cookie", b"a=1"), (b"x", b""), (b"set-cookie", b"b=\xe9")]
    it = rig(Script(start(200, *cookies), body()))
    assert [item for item in it.ask(GET)[0].headers if item[0] in (b"set-cookie", b"x")] == cookies


# Lengths that are not true


@pytest.mark.parametrize("messages", [[body(b"abcdef")], [body(b"abc", more=True), body(b"def", more=True)]])
def test_a_body_that_is_too_long_is_cut(rig: Any, messages: list[Any]) -> None:
    app = Script(start(200, (b"content-length", b"4")), *messages)
    it = rig(app)
    (response,) = it.ask(GET)
    assert (response.body, response.complete) == (b"abcd", True)
    assert [type(error) for error in app.errors] == [AppProtocolError]
    assert "longer" in str(app.errors[0])
    assert it.phase is Phase.LINGERING
    assert it.service.records[0].cause == "app_error"


@pytest.mark.parametrize("messages", [[body(b"abc")], [body(b"a", more=True), body(b"bc")], [body()]])
def test_a_body_that_is_too_short_has_no_fake_end(rig: Any, messages: list[Any]) -> None:
    app = Script(start(200, (b"content-length", b"4")), *messages)
    it = rig(app)
    (response,) = it.ask(GET)
    assert not response.complete
    assert [type(error) for error in app.errors] == [AppProtocolError]
    assert "shorter" in str(app.errors[0])
    assert it.phase is Phase.LINGERING
    assert it.transport.sent_eof


@pytest.mark.parametrize("request_", [HEAD, GET])
def test_an_old_length_does_not_matter_without_content(rig: Any, request_: bytes) -> None:
    app = Script(start(304 if request_ is GET else 200, (b"content-length", b"4")), body(b""))
    it = rig(app)
    it.ask(request_)
    assert app.errors == []
    assert it.phase is Phase.IDLE


# Wrong messages


BAD_STARTS = [
    start(200, (b"a\r\nb", b"c")),
    start(200, (b"a b", b"c")),
    start(200, (b"", b"c")),
    start(200, (b"a:", b"c")),
    start(200, (b"a", b"b\r\nset-cookie: c")),
    start(200, (b"a", b"b\nc")),
    start(200, (b"a", b"b\rc")),
    start(200, (b"a", b"b\x00c")),
    start(200, (b"a", b"b\x7f")),
    start(200, ("a", "b")),  # type: ignore[arg-type]
    start(200, (b"a", 5)),  # type: ignore[arg-type]
    start(200, (b"a",)),  # type: ignore[arg-type]
    start(200, (b"content-length", b"-1")),
    start(200, (b"content-length", b"3"), (b"content-length", b"4")),
    start(200, (b"content-length", b"")),
    start(200, (b"content-length", b"1" * 21)),
    start(200, (b"content-length", b"1" * 5000)),
    start(200, (b"transfer-encoding", b"gzip")),
    {**START, "headers": None},
    {**START, "headers": 5},
    start(100),
    start(0),
    start(1000),
    start("200"),  # type: ignore[arg-type]
    {"type": "http.response.start"},
]


@pytest.mark.parametrize("message", BAD_STARTS)
def test_a_bad_head_is_raised_and_becomes_a_clean_500(rig: Any, message: dict[str, Any]) -> None:
    app = Script(message, body(b"secret"))
    it = rig(app)
    (response,) = it.ask(GET)
    assert [type(error) for error in app.errors] == [AppProtocolError]
    assert (response.status, response.body) == (500, b"Internal Server Error")
    assert response.complete
    assert {name for name, _ in response.headers} == {b"content-type", b"server", b"content-length"}
    assert it.phase is Phase.IDLE
    assert (it.service.records[0].status, it.service.records[0].cause) == (500, "app_error")


@pytest.mark.parametrize(
    "messages",
    [
        [body(b"abc")],
        [{"type": "http.response.trailers"}],
        [{"type": "http.response.pathsend", "path": "/x"}],
        [start(), start()],
        [start(), body("text")],
        [start(), body(None)],
        [start(), {"type": "http.response.trailers"}],
        [start(), {"type": "http.response.pathsend", "path": "relative"}],
        [start(), {"type": "http.response.pathsend"}],
        [start(), {"type": "http.response.pathsend", "path": b"/x"}],
        [{"type": "http.response.push"}],
        [{"type": "http.response.early_hint", "links": ["text"]}],
        [{"type": "http.response.early_hint", "links": [b"a\r\nb: c"]}],
    ],
)
def test_wrong_messages_become_a_clean_500(rig: Any, messages: list[Any]) -> None:
    app = Script(*messages)
    it = rig(app)
    (response,) = it.ask(GET)
    assert [type(error) for error in app.errors] == [AppProtocolError]
    assert response.status == 500
    assert it.phase is Phase.IDLE


def test_an_application_that_goes_on_after_its_mistake(rig: Any) -> None:
    """The error was raised at that await; who catches it may still answer."""
    app = Script(
        body(b"early"), start(200, (b"a", b"\n")), start(), body(b"right"), start(), body(), reraise=False
    )
    (response,) = rig(app).ask(GET)
    assert (response.status, response.body) == (200, b"right")
    assert len(app.errors) == 2


def test_messages_behind_the_last_are_ignored(rig: Any) -> None:
    app = Script(start(), body(b"all"), body(b"more"), start(), {"type": "nonsense"})
    it = rig(app)
    assert len(it.ask(GET)) == 1
    assert app.errors == []
    assert it.phase is Phase.IDLE


# Failures


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    pass


async def raises(scope: Any, receive: Any, send: Any) -> None:
    raise ValueError("secret")


async def raises_held(scope: Any, receive: Any, send: Any) -> None:
    await send(start(200, (b"x-secret", b"1")))
    raise ValueError("secret")


async def raises_group(scope: Any, receive: Any, send: Any) -> None:
    raise ExceptionGroup("several", [ValueError("secret")])


@pytest.mark.parametrize("app", [nothing, raises, raises_held, raises_group])
@pytest.mark.parametrize("request_", [GET, HEAD, KEPT])
def test_a_failure_before_the_head_is_a_500(rig: Any, app: Any, request_: bytes, caplog: Any) -> None:
    it = rig(app)
    with caplog.at_level(logging.ERROR, "leanserve"):
        first, second = it.ask(request_, request_)
    assert first.status == second.status == 500
    assert b"secret" not in it.transport.wire
    assert it.phase is Phase.IDLE
    assert len(caplog.records) == 2


@pytest.mark.parametrize("request_", [GET, OLD])
def test_a_failure_behind_the_head_cuts(rig: Any, request_: bytes, caplog: Any) -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        await send(body(b"abc", more=True))
        raise ValueError("told to")

    it = rig(fails)
    with caplog.at_level(logging.ERROR, "leanserve"):
        (response,) = it.ask(request_)
    if request_ is OLD:
        assert it.transport.aborted  # an orderly end would be a proper one
    else:
        assert not response.complete
        assert it.phase is Phase.LINGERING
    assert it.service.records[0].cause == "app_error"
    assert len(caplog.records) == 1


@pytest.mark.parametrize("swallows", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_cancel(rig: Any, begun: bool, swallows: bool, caplog: Any) -> None:
    async def waits(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        if begun:
            await send(body(b"abc", more=True))
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if not swallows:
                raise

    it = rig(waits)
    it.ask(GET)
    with caplog.at_level(logging.ERROR, "leanserve"):
        it.service.exchanges[0].cancel("shutdown")
        it.service.exchanges[0].cancel("shutdown")
        it.service.loop.run()
    (response,) = it.read()
    assert (response.status, response.complete) == ((200, False) if begun else (response.status, True))
    assert begun or response.status in (500, 503)
    assert it.service.records[0].cause == "shutdown"
    assert not it.service.running


def test_cancel_before_the_first_step(rig: Any) -> None:
    """A request that arrives in the very turn in which the server stops waiting."""

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    it = rig(waits)
    it.transport.feed(GET)
    it.methods.append(b"GET")
    it.service.exchanges[0].cancel("shutdown")
    it.service.loop.run()
    assert not it.service.running
    (response,) = it.read()
    assert response.status == 503


# Receiving


class Listens:
    """Receives until the disconnect, then three times more."""

    def __init__(self, *, before: Any = (), after: Any = ()) -> None:
        self.heard: list[Any] = []
        self.before, self.after = before, after
        self.ended = False
        self.errors: list[Exception] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        for message in self.before:
            await send(message)
        while not self.heard or self.heard[-1]["type"] != "http.disconnect":
            self.heard.append(await receive())
        for _ in range(3):
            self.heard.append(await receive())
        for message in self.after:
            try:
                await send(message)
            except OSError as error:
                self.errors.append(error)
        self.ended = True


def test_disconnect_comes_at_once_and_every_time(rig: Any) -> None:
    app = Listens(after=[start(), body()])
    it = rig(app, cancel_on_disconnect=False)
    it.ask(POST + b"he")
    assert [message["type"] for message in app.heard] == ["http.request"]
    it.transport.feed_reset()
    it.service.loop.run()
    assert app.ended
    assert (
        app.heard
        == [{"type": "http.request", "body": b"he", "more_body": True}] + [{"type": "http.disconnect"}] * 4
    )
    assert [type(error) for error in app.errors] == [ClientDisconnected] * 2
    assert it.service.records[0].cause == "client_gone"


def test_disconnect_behind_the_own_last_message(rig: Any) -> None:
    app = Listens(before=[start(), body(b"done")])
    it = rig(app)
    it.ask(GET)
    assert [message["type"] for message in app.heard] == ["http.disconnect"] * 4
    assert it.phase is Phase.IDLE


def test_half_close_is_no_disconnect(rig: Any) -> None:
    """The answer is still wanted; a disconnect is told when it is out."""
    app = Listens(after=[start(), body(b"still")])
    it = rig(app)
    it.ask(POST + b"hello")
    it.transport.feed_eof()
    it.service.loop.run()
    assert [message["type"] for message in app.heard] == ["http.request"]
    it.transport.feed_reset()
    it.service.loop.run()
    assert it.service.records[0].cause == "client_gone"


def test_what_nobody_will_receive_is_not_kept(rig: Any) -> None:
    async def waits(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    it = rig(waits)
    it.ask(POST + b"he")
    it.transport.feed_reset()
    it.service.loop.run()
    assert it.service.exchanges[0].undelivered == b""


def test_a_body_in_pieces(rig: Any) -> None:
    heard: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while True:
            heard.append(await receive())
            if not heard[-1].get("more_body"):
                break
        await send(start())
        await send(body())

    it = rig(app)
    it.ask(POST)
    for piece in (b"he", b"llo"):
        it.transport.feed(piece)
        it.service.loop.run()
    assert b"".join(message["body"] for message in heard) == b"hello"
    assert [message["more_body"] for message in heard][-1] is False
    assert it.phase is Phase.IDLE
    assert it.service.records[0].received_bytes == 5


def test_one_message_for_a_request_without_a_body(rig: Any) -> None:
    app = Listens()
    it = rig(app)
    it.ask(GET)
    assert app.heard == [{"type": "http.request", "body": b"", "more_body": False}]
    it.transport.feed_reset()


# Expect: 100-continue


async def reads_then_answers(scope: Any, receive: Any, send: Any) -> None:
    data = b""
    while True:
        message = await receive()
        data += message.get("body", b"")
        if not message.get("more_body"):
            break
    await send(start())
    await send(body(data))


def test_100_is_sent_when_the_application_first_receives(rig: Any) -> None:
    gate: list[asyncio.Event] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        gate.append(asyncio.Event())
        await gate[0].wait()
        await reads_then_answers(scope, receive, send)

    it = rig(app)
    it.ask(EXPECT)
    assert it.transport.wire == b""
    gate[0].set()
    it.service.loop.run()
    assert it.transport.wire.startswith(b"HTTP/1.1 100 ")
    for piece in (b"he", b"llo"):
        it.transport.feed(piece)
        it.service.loop.run()
    (response,) = it.read()
    assert (response.interim, response.body) == ([100], b"hello")


def test_no_100_when_the_body_is_there(rig: Any) -> None:
    it = rig(reads_then_answers)
    (response,) = it.ask(EXPECT + b"hello")
    assert (response.interim, response.body) == ([], b"hello")


def test_no_100_for_an_application_that_does_not_read(rig: Any) -> None:
    it = rig(Script(start(413), body()))
    (response,) = it.ask(EXPECT)
    assert (response.interim, response.status, response.closes) == ([], 413, True)


def test_no_100_within_a_response(rig: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        await send(body(b"first", more=True))
        message = await receive()
        await send(body(message["body"]))

    it = rig(app)
    it.ask(EXPECT)
    it.transport.feed(b"hello")
    it.service.loop.run()
    (response,) = it.read()
    assert (response.interim, response.body) == ([], b"firsthello")
    assert b" 100 " not in it.transport.wire


def test_no_100_for_an_old_client(rig: Any) -> None:
    it = rig(reads_then_answers)
    (response,) = it.ask(EXPECT.replace(b"1.1", b"1.0") + b"hello")
    assert (response.interim, response.body) == ([], b"hello")


# Early hints and trailers


def test_early_hints(rig: Any) -> None:
    hint = {"type": "http.response.early_hint", "links": [b"</a>; rel=preload", b"</b>"]}
    it = rig(Script(hint, start(), hint, body(b"x", more=True), hint, body()))
    (response,) = it.ask(GET)
    assert (response.interim, response.body) == ([103, 103], b"x")
    assert it.transport.wire.count(b"link: </a>; rel=preload\r\nlink: </b>\r\n") == 2
    assert rig(Script(hint, start(), body())).ask(OLD)[0].interim == []


@pytest.mark.parametrize("request_", [TRAILERS, GET, OLD])
def test_trailers(rig: Any, request_: bytes) -> None:
    messages = [
        {"type": "http.response.trailers", "headers": [(b"X-A", b"1")], "more_trailers": True},
        {"type": "http.response.trailers", "headers": [(b"x-b", b"2")]},
    ]
    app = Script(start(200, trailers=True), body(b"ab", more=True), body(b"c"), *messages)
    it = rig(app)
    (response,) = it.ask(request_)
    assert (response.body, response.complete) == (b"abc", True)
    assert response.trailers == ([(b"x-a", b"1"), (b"x-b", b"2")] if request_ is TRAILERS else [])
    assert app.errors == []
    assert it.phase is (Phase.LINGERING if request_ is OLD else Phase.IDLE) or it.phase is Phase.CLOSED


@pytest.mark.parametrize(
    "bad",
    [(b"a", b"b\r\nc: d"), (b"content-length", b"3"), (b"transfer-encoding", b"chunked"), (b"Host", b"x")],
)
def test_trailers_that_cannot_be(rig: Any, bad: tuple[bytes, bytes]) -> None:
    """RFC 9110 section 6.5.1: no framing or routing fields; and no injection."""
    app = Script(
        start(200, trailers=True), body(b"abc"), {"type": "http.response.trailers", "headers": [bad]}
    )
    it = rig(app)
    (response,) = it.ask(TRAILERS)
    assert [type(error) for error in app.errors] == [AppProtocolError]
    assert not response.complete
    assert it.phase is Phase.LINGERING


def test_trailers_that_were_promised_and_did_not_come(rig: Any) -> None:
    it = rig(Script(start(200, trailers=True), body(b"abc")))
    assert not it.ask(TRAILERS)[0].complete


# Files


def send_file(path: Any) -> dict[str, Any]:
    return {"type": "http.response.pathsend", "path": str(path)}


def test_a_path_that_is_no_file_is_a_clean_500(rig: Any, tmp_path: Any) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "fifo"):
        app = Script(start(), send_file(path))
        (response,) = rig(app).ask(GET)
        assert response.status == 500, path
        assert len(app.errors) == 1
        assert not isinstance(app.errors[0], ClientDisconnected), path


# Contexts


def test_contexts_do_not_leak_from_request_to_request(rig: Any) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(variable.get())
        variable.set("of a request")
        await reads_then_answers(scope, receive, send)

    it = rig(app)
    it.service.context.run(variable.set, "of the lifespan")
    it.methods += [b"GET", b"GET"]
    it.ask(GET + GET + POST.replace(b"5", b"200000"))
    for _ in range(20):
        it.transport.feed(b"x" * 10_000)
        it.service.loop.run()
    it.ask(GET)
    assert seen == ["of the lifespan"] * 4
    assert variable.get() == "none"


# Records


class OddStatus(int):
    """As an enum of the application's own may be: not what a log should print."""

    def __str__(self) -> str:
        return "odd"


def test_a_record_holds_a_plain_status(rig: Any) -> None:
    it = rig(Script(start(OddStatus(201)), body(b"x")))
    (response,) = it.ask(GET)
    assert response.status == 201
    assert type(it.service.records[0].status) is int


def test_records(rig: Any) -> None:
    it = rig(reads_then_answers)
    it.ask(POST + b"hello")
    (record,) = it.service.records
    assert (record.method, record.path, record.query, record.version) == ("POST", "/", "", "1.1")
    assert (record.status, record.received_bytes, record.sent_bytes, record.cause) == (200, 5, 5, "")
    assert record.first_byte_s is not None
    assert 0 <= record.first_byte_s <= record.duration_s < 10
    assert record.client == ("192.0.2.1", 1234)
