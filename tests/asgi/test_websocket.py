"""One WebSocket exchange: scope, handshake, messages, and every way in which it can end."""

from __future__ import annotations

import asyncio
import itertools
import logging
import struct
from typing import Any

import pytest

from leanserve.asgi.websocket import WebSocketMachine, WebSocketMove, WebSocketState
from leanserve.errors import AppProtocolError, ClientDisconnected, IllegalTransition
from ws_frames import BINARY, CLOSE, CONT, PING, PONG, TEXT, close, frame
from ws_session import Session, session

DISCONNECT = "websocket.disconnect"
SILENT = "no answer to a ping"
PINGS = [(PING, b""), (PING, b"")]


def code(number: int, reason: bytes = b"") -> tuple[int, bytes]:
    """A Close frame as sent."""
    return (CLOSE, struct.pack("!H", number) + reason)


def disconnect(number: int, reason: str = "") -> dict[str, Any]:
    return {"type": DISCONNECT, "code": number, "reason": reason}


class Echo:
    """Accepts, echoes, and keeps what it received."""

    def __init__(self, accept: dict[str, Any] | None = None) -> None:
        self.scope: dict[str, Any] = {}
        self.received: list[dict[str, Any]] = []
        self.accept = {"type": "websocket.accept", **(accept or {})}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope = scope
        self.received.append(await receive())
        await send(self.accept)
        while True:
            message = await receive()
            self.received.append(message)
            if message["type"] == DISCONNECT:
                return
            await send({**message, "type": "websocket.send"})


# The machine


def test_full_product() -> None:
    for state, move in itertools.product(WebSocketState, WebSocketMove):
        machine = WebSocketMachine()
        machine.state = state
        if machine.accepts(move):
            assert machine.advance(move) >= state
        else:
            with pytest.raises(IllegalTransition):
                machine.advance(move)
            assert machine.state is state
        # whatever happens to the connection is no fault of ours
        machine.state = state
        assert machine.advance(WebSocketMove.LOSE) is WebSocketState.CLOSED


# Handshake


def test_scope() -> None:
    app = Echo()
    with session(app) as s:
        s.shake(b"sec-websocket-protocol: a, b", b"x-own: 1")
        scope = app.scope
        assert scope["type"] == "websocket"
        assert scope["asgi"]["version"] == "3.0"
        assert scope["scheme"] == "ws"
        assert scope["http_version"] == "1.1"
        assert scope["path"] == "/ws/ü"
        assert scope["raw_path"] == b"/ws/%C3%BC"
        assert scope["query_string"] == b"q=1"
        assert scope["client"] == ("192.0.2.1", 1234)
        assert scope["server"] == ("192.0.2.2", 80)
        assert scope["subprotocols"] == ["a", "b"]
        assert scope["state"] == {"model": "m"}
        assert scope["state"] is not s.service.state
        assert scope["extensions"] == {
            "websocket.http.response": {},
            "leanserve.cancellation": {"policy": "cancel", "cause": None},
            "leanserve.shutdown": s.service.shutdown,
        }
        assert "method" not in scope
        assert (b"x-own", b"1") in scope["headers"]
        assert app.received == [{"type": "websocket.connect"}]



def test_accept() -> None:
    app = Echo({"subprotocol": "b", "headers": [(b"X-Own", b"1"), (b"Server", b"mine")]})
    with session(app) as s:
        s.shake(b"sec-websocket-protocol: a, b")
        lines = s.head().split(b"\r\n")
        assert lines[0].startswith(b"HTTP/1.1 101 ")
        assert lines.count(b"sec-websocket-protocol: b") == 1
        assert b"x-own: 1" in lines
        assert [line for line in lines if line.startswith(b"server")] == [b"server: mine"]
        assert b"sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=" in lines
        assert not any(line.startswith((b"content-length", b"transfer-encoding")) for line in lines)
        assert s.body() == b""



def test_frames_behind_the_handshake_are_messages() -> None:
    app = Echo()
    with session(app) as s:
        s.shake(behind=frame(TEXT, b"early") + frame(BINARY, b"la")[:3])
        s.feed(frame(BINARY, b"la")[3:])
        assert s.frames() == [(TEXT, b"early"), (BINARY, b"la")]



def test_a_bad_handshake_never_reaches_the_application() -> None:
    app = Echo()
    with session(app) as s:
        s.feed(
            b"GET / HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
            b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 8\r\n\r\n"
            b"GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n"
        )
        assert s.head().startswith(b"HTTP/1.1 426 ")
        assert b"sec-websocket-version: 13" in s.head()
        assert b"connection: close" in s.head()
        assert s.transport.wire.count(b"HTTP/1.1") == 1
        assert s.service.exchanges == []
        assert app.received == []
        assert len(s.service.refusals) == 1



@pytest.mark.parametrize(
    "accept",
    [
        {"subprotocol": "unknown"},
        {"headers": [(b"x", b"a\r\nb: c")]},
        {"headers": [(b"sec-websocket-protocol", b"a")]},
        {"headers": [("x", "y")]},
        {"headers": 7},
    ],
)
def test_an_accept_that_cannot_be_is_a_500(accept: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with session(Echo(accept)) as s:
        s.shake()
        assert s.head().startswith(b"HTTP/1.1 500 ")
        assert s.record.status == 500
        assert s.record.cause == "app_error"

    assert "AppProtocolError" in caplog.text


def test_compression_only_when_it_is_switched_on() -> None:
    offer = b"sec-websocket-extensions: permessage-deflate; client_max_window_bits"
    with session(Echo()) as s:
        s.shake(offer)
        assert b"sec-websocket-extensions" not in s.head()
    with session(Echo(), ws_per_message_deflate=True) as s:
        s.shake(offer)
        assert b"sec-websocket-extensions: permessage-deflate; client_max_window_bits=15" in s.head()
        s.feed(frame(TEXT, bytes.fromhex("f248cdc9c90700"), rsv=4))
        ((opcode, payload),) = s.frames()
        assert (opcode, payload) == (TEXT, bytes.fromhex("f248cdc9c90700"))



# Denial


def test_close_before_accept_is_403() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.close", "code": 4000})
        await send({"type": "websocket.close"})
        seen.append(await receive())

    with session(app) as s:
        s.shake(behind=b"GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n")
        assert s.head().startswith(b"HTTP/1.1 403 ")
        assert b"connection: close" in s.head()
        assert s.body() == b"Forbidden"
        assert s.transport.sent_eof
        assert s.record.status == 403
        assert seen == [disconnect(1006)]



def test_denial_response() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"X-Why", b"because"), (b"content-length", b"9")]
        await send({"type": "websocket.http.response.start", "status": 401, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": b"go ", "more_body": True})
        await send({"type": "websocket.http.response.body", "body": b"away"[:4], "more_body": True})
        await send({"type": "websocket.http.response.body", "body": b"!!"})

    with session(app) as s:
        s.shake()
        lines = s.head().split(b"\r\n")
        assert lines[0].startswith(b"HTTP/1.1 401 ")
        assert [line for line in lines if line.startswith((b"content-", b"transfer-"))] == [
            b"content-length: 9"
        ]
        assert b"x-why: because" in lines
        assert s.body() == b"go away!!"
        assert s.transport.sent_eof
        assert (s.record.status, s.record.sent_bytes) == (401, 9)



def test_denial_without_a_length_is_chunked() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.http.response.start", "status": 429})
        await send({"type": "websocket.http.response.body", "body": b"a", "more_body": True})
        await send({"type": "websocket.http.response.body"})

    with session(app) as s:
        s.shake()
        assert b"transfer-encoding: chunked" in s.head()
        assert s.body() == b"1\r\na\r\n0\r\n\r\n"



@pytest.mark.parametrize(
    ("messages", "status"),
    [
        ([], 500),
        ([{"type": "websocket.http.response.start", "status": 401}], 500),
        ([{"type": "websocket.http.response.start", "status": 101}], 500),
        ([{"type": "websocket.http.response.start", "status": "401"}], 500),
        ([{"type": "websocket.http.response.start", "status": 401, "headers": [(b"a b", b"")]}], 500),
        ([{"type": "websocket.http.response.start", "status": 401}, {"type": "websocket.accept"}], 500),
        ([{"type": "websocket.http.response.start", "status": 401}] * 2, 500),
        ([{"type": "websocket.http.response.body", "body": b""}], 500),
        ([{"type": "websocket.send", "text": "x"}], 500),
        ([{"type": "http.response.start", "status": 200}], 500),
        ([{"type": "websocket.nonsense"}], 500),
        (
            [
                {"type": "websocket.http.response.start", "status": 401},
                {"type": "websocket.http.response.body", "body": "text"},
            ],
            500,
        ),
    ],
)
def test_a_fault_before_the_head_is_a_clean_500(messages: list[Any], status: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    with session(app) as s:
        s.shake()
        assert s.head().startswith(b"HTTP/1.1 %d " % status)
        assert s.record.cause == "app_error"
        assert s.transport.sent_eof



def test_a_denial_that_breaks_off_does_not_look_complete() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.http.response.start", "status": 401})
        await send({"type": "websocket.http.response.body", "body": b"a", "more_body": True})
        raise ValueError("boom")

    with session(app) as s:
        s.shake()
        assert s.body() == b"1\r\na\r\n"
        assert s.transport.aborted



def test_a_denial_longer_than_declared_is_cut_and_told() -> None:
    errors: list[BaseException] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"2")]
        await send({"type": "websocket.http.response.start", "status": 401, "headers": headers})
        try:
            await send({"type": "websocket.http.response.body", "body": b"abc"})
        except AppProtocolError as error:
            errors.append(error)

    with session(app) as s:
        s.shake()
        assert s.body() == b"ab"
        assert len(errors) == 1



# Messages


def test_echo() -> None:
    app = Echo()
    with session(app) as s:
        s.shake()
        s.feed(frame(TEXT, "ü".encode()) + frame(BINARY, b"\0\1") + frame(TEXT) + frame(BINARY))
        s.feed(frame(TEXT, b"a", fin=False))
        s.feed(frame(CONT, b"b"))
        assert s.frames()[:2] == [(TEXT, "ü".encode()), (BINARY, b"\0\1")]
        assert s.frames()[2:] == [(TEXT, b""), (BINARY, b""), (TEXT, b"ab")]
        record = s.exchange.record
        assert (record.received_bytes, record.sent_bytes) == (6 * (2 + 4) + 6, 5 * 2 + 6)
        assert app.received[1] == {"type": "websocket.receive", "text": "ü"}
        assert app.received[2] == {"type": "websocket.receive", "bytes": b"\0\1"}



@pytest.mark.parametrize(
    ("message", "sent"),
    [
        ({"text": "a"}, (TEXT, b"a")),
        ({"text": ""}, (TEXT, b"")),
        ({"bytes": b"a"}, (BINARY, b"a")),
        ({"bytes": b"", "text": None}, (BINARY, b"")),
        ({"bytes": None, "text": "a"}, (TEXT, b"a")),
        ({"bytes": bytearray(b"a")}, (BINARY, b"a")),
        ({"bytes": memoryview(b"a")}, (BINARY, b"a")),
        ({"bytes": b"a", "text": "b"}, (BINARY, b"a")),
        ({}, None),
        ({"text": None, "bytes": None}, None),
        ({"text": b"a"}, None),
        ({"bytes": "a"}, None),
        ({"text": 1}, None),
        ({"text": "\ud800"}, None),
    ],
)
def test_what_can_be_sent(message: dict[str, Any], sent: tuple[int, bytes] | None) -> None:
    errors: list[BaseException] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        try:
            await send({"type": "websocket.send", **message})
        except AppProtocolError as error:
            errors.append(error)
        await send({"type": "websocket.send", "text": "on"})  # a wrong message costs nothing but itself

    with session(app) as s:
        s.shake()
        expected = [] if sent is None else [sent]
        assert s.frames() == [*expected, (TEXT, b"on"), code(1000)]
        assert len(errors) == (sent is None)



def test_send_waits_for_a_peer_that_reads() -> None:
    sent = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        for number in range(10):
            await send({"type": "websocket.send", "bytes": b"x" * 600})
            sent.append(number)

    with session(app, send_high_water=2000, kernel_bytes=600) as s:
        s.shake()
        assert len(sent) == 4  # 600 bytes are in the kernel, 2000 are held here, the rest waits
        for _ in range(5):
            s.transport.peer_reads()
            s.settle()
        assert len(sent) == 10
        assert s.frames() == [(BINARY, b"x" * 600)] * 10 + [code(1000)]



def test_reading_stops_while_the_application_does_not_receive() -> None:
    go = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await go.wait()
        echo = Echo()
        while (await receive())["type"] != DISCONNECT:
            echo.received.append({})
            seen.append(1)

    seen: list[int] = []

    with session(app, receive_high_water=10_000) as s:
        s.shake()
        fed = 0
        while s.transport.is_reading():
            s.feed(frame(BINARY, b"x" * 1000))
            fed += 1
        assert 5 < fed < 12
        s.feed(frame(BINARY, b"y") * 1000)
        assert len(seen) == 0
        go.set()
        for _ in range(50):
            s.settle()
        assert len(seen) == fed + 1000
        assert s.transport.is_reading()



def test_pings_are_answered_while_the_application_sleeps() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        await asyncio.Event().wait()

    with session(app) as s:
        s.shake()
        s.feed(frame(PING, b"1") + frame(TEXT, b"x") + frame(PING, b"2"))
        assert s.frames() == [(PONG, b"1"), (PONG, b"2")]



# Who closes, and when: exactly one code for the application, exactly one Close for the peer


def peer_closes(s: Session) -> None:
    s.feed(close(4001, b"bye"))


def peer_closes_without_code(s: Session) -> None:
    s.feed(close())


def peer_closes_and_leaves(s: Session) -> None:
    s.transport.feed(close(1001))
    s.transport.feed_eof()
    s.settle()


def peer_vanishes(s: Session) -> None:
    s.lose()


def peer_half_closes(s: Session) -> None:
    s.eof()


def peer_violates(s: Session) -> None:
    s.feed(frame(TEXT, b"x", mask=None))


def peer_sends_no_utf8(s: Session) -> None:
    s.feed(frame(TEXT, b"\xff"))


def peer_sends_too_much(s: Session) -> None:
    s.feed(frame(BINARY, bytes(101)))


def server_stops(s: Session) -> None:
    s.connection.drain()
    s.settle()
    assert s.frames() == [], "a drain alone says nothing"
    s.connection.cancel("shutdown")
    s.exchange.cancel("shutdown")  # the worker does both
    s.settle()


def peer_is_silent(s: Session) -> None:
    s.pass_time(20)
    assert s.frames() == [(PING, b"")]
    s.pass_time(20.9)
    assert s.frames() == [(PING, b"")] * 2
    s.pass_time(0.2)


@pytest.mark.parametrize(
    ("how", "told", "sent", "cause"),
    [
        (peer_closes, disconnect(4001, "bye"), [code(4001)], ""),
        (peer_closes_without_code, disconnect(1005), [(CLOSE, b"")], ""),
        (peer_closes_and_leaves, disconnect(1001), [code(1001)], ""),
        (peer_vanishes, disconnect(1006), [], "client_gone"),
        (peer_half_closes, disconnect(1006), [], "client_gone"),
        (peer_violates, disconnect(1002), [code(1002)], "bad_request"),
        (peer_sends_no_utf8, disconnect(1007), [code(1007)], "bad_request"),
        (peer_sends_too_much, disconnect(1009), [code(1009)], "bad_request"),
        (server_stops, disconnect(1012), [code(1012)], "shutdown"),
        (peer_is_silent, disconnect(1011, SILENT), [*PINGS, code(1011, SILENT.encode())], "client_gone"),
    ],
)
@pytest.mark.parametrize("waiting", [True, False], ids=["receiving", "busy"])
def test_every_end_has_one_code(how: Any, told: Any, sent: Any, cause: str, waiting: bool) -> None:
    go = asyncio.Event()
    received: list[Any] = []
    after: list[type[BaseException]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        if not waiting:
            await go.wait()
        received.extend([await receive(), await receive()])
        for kind in ("send", "accept"):
            try:
                await send({"type": f"websocket.{kind}", "text": "late"})
            except ClientDisconnected as error:
                after.append(type(error))
        await send({"type": "websocket.close", "code": 1000})  # no-op

    with session(app, ws_max_size=100) as s:
        s.shake()
        how(s)
        if not waiting and cause == "bad_request":
            s.pass_time(1)  # a fault waits a little for what came before it
        go.set()
        s.settle()
        assert s.exchange.task.done()
        assert [r | {"reason": ""} for r in received] == [told | {"reason": ""}] * 2
        if cause != "bad_request":
            assert received[0]["reason"] == told["reason"]
        assert after == [ClientDisconnected] * 2
        assert s.frames() == sent
        s.lose()
        assert s.record.status == 101
        assert s.record.cause == cause



def test_messages_before_the_close_are_delivered_first() -> None:
    for end in (peer_closes, peer_vanishes, peer_half_closes):
        deliver_then_end(end)


def deliver_then_end(end: Any) -> None:
    go = asyncio.Event()
    got: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await go.wait()
        while not got or got[-1]["type"] != DISCONNECT:
            got.append(await receive())

    with session(app, receive_high_water=1000) as s:
        s.shake()
        s.feed(frame(TEXT, b"x" * 100) * 20)  # more than the inbox takes
        assert not s.transport.is_reading()
        end(s)
        go.set()
        for _ in range(5):
            s.settle()
        assert [m.get("text") for m in got[:-1]] == ["x" * 100] * 20
        assert got[-1] == (disconnect(4001, "bye") if end is peer_closes else disconnect(1006))


def test_what_came_before_a_fault_may_be_answered() -> None:
    with session(Echo()) as s:
        s.shake()
        s.feed(frame(TEXT, b"good") + frame(TEXT, b"bad", rsv=1))
        assert s.frames() == [(TEXT, b"good"), code(1002)]
        assert s.transport.sent_eof



def test_a_fault_and_an_application_that_never_receives() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        await asyncio.Event().wait()

    with session(app) as s:
        s.shake()
        s.feed(frame(TEXT, b"bad", rsv=1))
        assert s.frames() == []
        s.pass_time(0.9)
        assert s.frames() == []
        s.pass_time(0.2)
        assert s.frames() == [code(1002)]



def app_that(*messages: dict[str, Any], then: BaseException | None = None, wait: bool = False) -> Any:
    """Accepts, sends the messages, and ends so."""
    received: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        for message in messages:
            await send(message)
        if then is not None:
            raise then
        if wait:
            received.append(await receive())

    app.received = received  # type: ignore[attr-defined]
    return app


@pytest.mark.parametrize(
    ("app", "sent", "cause"),
    [
        (app_that({"type": "websocket.close"}), code(1000), ""),
        (app_that({"type": "websocket.close", "code": 4000, "reason": "ü"}), code(4000, "ü".encode()), ""),
        (app_that({"type": "websocket.close", "code": 1005}), (CLOSE, b""), ""),
        (app_that({"type": "websocket.close", "reason": None}), code(1000), ""),
        (app_that(*[{"type": "websocket.close", "code": 4000}] * 3), code(4000), ""),
        (app_that(), code(1000), ""),
        (app_that(then=ValueError("boom")), code(1011), "app_error"),
        (app_that({"type": "websocket.close", "code": 1006}), code(1011), "app_error"),
        (app_that({"type": "websocket.close", "code": "1000"}), code(1011), "app_error"),
        (app_that({"type": "websocket.close", "reason": b"x"}), code(1011), "app_error"),
        (app_that({"type": "websocket.accept"}), code(1011), "app_error"),
        (app_that({"type": "websocket.http.response.start", "status": 400}), code(1011), "app_error"),
        (app_that({"type": "websocket.http.response.body"}), code(1011), "app_error"),
        (app_that({"type": "nonsense"}), code(1011), "app_error"),
    ],
)
@pytest.mark.parametrize("answered", [True, False])
def test_the_application_closes(app: Any, sent: Any, cause: str, answered: bool) -> None:
    with session(app) as s:
        s.shake()
        assert s.frames() == [sent]
        assert not s.transport.sent_eof
        s.feed(frame(PING, b"x") + frame(TEXT, b"late"))
        if answered:
            s.feed(close(1000))
        else:
            s.pass_time(9.9)
            assert not s.transport.sent_eof
            s.pass_time(0.2)
        assert s.frames() == [sent]
        assert s.transport.sent_eof
        assert s.record.cause == cause



def test_who_closes_first_has_said_the_code() -> None:
    app = app_that({"type": "websocket.close", "code": 4000, "reason": "ours"}, wait=True)
    with session(app) as s:
        s.shake()
        s.feed(close(4999))
        assert app.received == [disconnect(4000, "ours")]


def test_the_peers_close_is_found_behind_what_nobody_received() -> None:
    with session(app_that(), receive_high_water=1000) as s:
        s.shake(behind=frame(TEXT, b"x" * 100) * 20)
        assert s.frames() == [code(1000)]
        s.feed(close(1000))
        assert s.transport.sent_eof


@pytest.mark.parametrize("stop", [True, False])
def test_what_is_undelivered_when_we_close_is_dropped(stop: bool) -> None:
    go = asyncio.Event()
    received: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await go.wait()
        await send({"type": "websocket.close", "code": 4000})
        received.append(await receive())

    with session(app, receive_high_water=1000) as s:
        s.shake()
        s.feed(frame(TEXT, b"x" * 100) * 20)
        assert not s.transport.is_reading()
        if stop:
            s.connection.cancel("shutdown")
        go.set()
        s.settle()
        s.feed(frame(TEXT, b"late"))
        assert received == [disconnect(1012 if stop else 4000)]
        s.feed(close(1000))  # it is read, behind all that nobody wants
        assert s.transport.sent_eof


def test_a_close_of_ours_behind_a_fault_of_theirs_ends_at_once() -> None:
    go = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        await go.wait()

    with session(app) as s:
        s.shake()
        s.feed(frame(TEXT, b"x", rsv=1))
        assert not s.transport.sent_eof
        go.set()
        s.settle()
        assert s.frames() == [code(1000)]
        assert s.transport.sent_eof



def test_crashes_are_logged_with_their_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with session(app_that(then=ValueError("boom"))) as s:
        s.shake()

    assert "Traceback" in caplog.text
    assert "ValueError: boom" in caplog.text


@pytest.mark.parametrize("grouped", [True, False])
def test_a_client_that_has_gone_is_no_error(grouped: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await receive()
        try:
            await send({"type": "websocket.send", "text": "x"})
        except OSError as error:
            if grouped:
                raise ExceptionGroup("tasks", [error]) from None
            raise

    with session(app) as s:
        s.shake()
        s.lose()
        assert s.exchange.task.done()

    assert not [r for r in caplog.records if r.name == "leanserve"]


def test_send_that_waits_ends_with_the_connection() -> None:
    errors: list[BaseException] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        try:
            while True:
                await send({"type": "websocket.send", "bytes": b"x" * 1000})
        except ClientDisconnected as error:
            errors.append(error)

    with session(app, send_high_water=2000, kernel_bytes=600) as s:
        s.shake()
        assert not errors
        s.lose()
        assert len(errors) == 1



# Loss and shutdown during the handshake


@pytest.mark.parametrize("reply", ["websocket.accept", "websocket.close", "websocket.http.response.start"])
def test_loss_during_the_handshake(reply: str) -> None:
    go = asyncio.Event()
    got: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        got.append(await receive())
        await go.wait()
        got.append(await receive())
        try:
            await send({"type": reply, "status": 400})
        except OSError:
            got.append("gone")

    with session(app) as s:
        s.shake()
        s.lose()
        go.set()
        s.settle()
        last = [] if reply == "websocket.close" else ["gone"]
        assert got == [{"type": "websocket.connect"}, disconnect(1006), *last]
        assert s.transport.wire == b""
        assert (s.record.status, s.record.cause) == (499, "client_gone")



def test_a_client_that_half_closed_gets_its_answer() -> None:
    go = asyncio.Event()
    app = Echo()

    async def late(scope: Any, receive: Any, send: Any) -> None:
        await go.wait()
        await app(scope, receive, send)

    with session(late) as s:
        s.shake(behind=frame(TEXT, b"x"))
        s.eof()
        assert not s.transport.is_closing()
        go.set()
        s.settle()
        assert s.head().startswith(b"HTTP/1.1 101 ")
        assert app.received[-1] == disconnect(1006)



def test_shutdown_during_the_handshake_is_503() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    with session(app) as s:
        s.shake()
        s.connection.cancel("shutdown")
        s.settle()
        assert s.head().startswith(b"HTTP/1.1 503 ")
        assert s.record.status == 503



def test_an_application_that_ignores_the_shutdown_is_cancelled() -> None:
    cancelled = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with session(app) as s:
        s.shake()
        s.connection.cancel("shutdown")
        s.settle()
        assert s.frames() == [code(1012)]
        assert not cancelled.is_set()
        s.pass_time(0.6)
        assert cancelled.is_set()
        assert s.frames() == [code(1012)]



def test_the_context_is_a_copy_of_the_workers() -> None:
    import contextvars

    var: contextvars.ContextVar[str] = contextvars.ContextVar("var", default="unset")
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(var.get())
        var.set("app")

    var.set("startup")
    for _ in range(2):
        with session(app) as s:
            s.shake()
    assert var.get() == "startup"

    assert seen == ["startup", "startup"]
