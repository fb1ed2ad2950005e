"""leanserve.worker.worker: one worker on real sockets, from start to drain, with both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import socket
import time
import weakref
from typing import Any

import pytest

from leanserve.asgi.http import HttpExchange
from leanserve.errors import BootFailed, ClientDisconnected, SettingsError
from leanserve.scoreboard import Scoreboard
from leanserve.settings import Settings
from leanserve.tally import CAUSES, STATUSES
from leanserve.transport.connection import Connection
from leanserve.worker.worker import Worker, WorkerMachine, WorkerMove, WorkerState
from machines import reachable, walk
from served import GET, Client, eventually, fetch, hello, listener, run, serving

CLOSE = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class App:
    """Does what the path says; keeps what it saw."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.go_on = asyncio.Event()
        self.sent = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                self.log.append(message["type"])
                await send({"type": message["type"] + ".complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        await getattr(self, scope["path"].strip("/") or "plain")(scope, receive, send)

    async def plain(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"plain"})

    async def slow(self, scope: Any, receive: Any, send: Any) -> None:
        self.log.append("slow")
        await self.go_on.wait()
        await self.plain(scope, receive, send)

    async def stuck(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.log.append("cancelled")
            raise

    async def stubborn(self, scope: Any, receive: Any, send: Any) -> None:
        for _ in range(3):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(30)

    async def background(self, scope: Any, receive: Any, send: Any) -> None:
        await self.plain(scope, receive, send)
        await asyncio.sleep(0.3)
        self.log.append("background")

    async def flood(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                self.sent += 65536
        except OSError as error:
            self.log.append(error)

    async def listen(self, scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] != "http.disconnect":
            pass
        self.log += [message, await receive(), await receive()]
        try:
            await send({"type": "http.response.start", "status": 200})
        except OSError as error:
            self.log.append(error)


def request(path: str, extra: bytes = b"") -> bytes:
    return b"GET /" + path.encode() + b" HTTP/1.1\r\nhost: a\r\n" + extra + b"\r\n"


# The machine


def test_every_state_and_move() -> None:
    walk(WorkerMachine, WorkerState, WorkerMove)
    assert WorkerState.READY not in reachable(WorkerMachine, WorkerState.DRAINING)
    assert reachable(WorkerMachine, WorkerState.STOPPED) == set()


# Serving


def test_serves_and_says_where(loop: str) -> None:
    async def main() -> None:
        async with serving(hello, listener(), listener()) as worker:
            assert [address[0] for address in worker.addresses] == ["127.0.0.1"] * 2
            assert all(address[1] for address in worker.addresses)
            first, second = await fetch(worker, GET, CLOSE)
            assert (first.body, second.body) == (b"hello", b"hello")
            names = [name for name, _ in first.headers]
            assert names.count(b"date") == names.count(b"server") == 1
            assert "READY" in repr(worker)
        assert "STOPPED" in repr(worker)

    run(loop, main)


def test_default_headers_can_be_switched_off(loop: str) -> None:
    async def main() -> None:
        flat = {"server_header": False, "date_header": False, "header": ("X-One: 1", "x-two:2")}
        async with serving(hello, **flat) as worker:
            (response,) = await fetch(worker, CLOSE)
            assert {name for name, _ in response.headers} == {
                b"content-length",
                b"connection",
                b"x-one",
                b"x-two",
            }
            (refusal,) = await fetch(worker, b"\x00\r\n\r\n")
            assert refusal.get(b"x-one") == b"1"
            assert refusal.get(b"server") is None

    run(loop, main)


@pytest.mark.fastpath
def test_statistics_and_the_debug_line_tell_of_the_fast_path(
    loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving(hello) as worker:
            await fetch(worker, CLOSE)
            await fetch(worker, CLOSE.replace(b"\r\n\r\n", b"\r\nTE: trailers\r\n\r\n"))
            counts = worker.statistics()
            assert (counts["heads_recognised"], counts["heads_declined"]) == (1, 1)
            assert (counts["frames_recognised"], counts["frames_declined"]) == (0, 0)
            with caplog.at_level("DEBUG", logger="leanserve"):
                worker._tell_fastpath()
                worker._tell_fastpath()
        told = [record.getMessage() for record in caplog.records if "plain" in record.getMessage()]
        assert told == ["1 request heads were not plain; in the last it was the field te"]

    run(loop, main)


def test_the_scoreboard_is_told_all_that_was_done(loop: str) -> None:
    async def main() -> None:
        board = Scoreboard.create()
        lane = board.lane(0, 0)
        lane.begin(1, 0)
        async with serving(hello, lane=lane) as worker:
            for _ in range(3):
                (response,) = await fetch(worker, CLOSE)
            assert board.read(0, 0).in_flight == 0
        record = board.read(0, 0)
        assert (record.requests, record.bytes_in) == (3, 0)
        assert record.bytes_out == 3 * len(response.body) > 0
        board.close()

    run(loop, main)


class Answers:
    """Ends as the path says."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await receive()
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/stream":
            for _ in range(3):
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
        if scope["path"] == "/fail":
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            raise RuntimeError("as asked")
        await send({"type": "http.response.body", "body": b""})


UPGRADE = (
    b"GET /ws HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


@pytest.mark.parametrize("access_log", [False, True])
def test_a_watched_worker_tallies_its_requests(loop: str, access_log: bool) -> None:
    async def main() -> None:
        board = Scoreboard.create()
        board.tell_server(watched=1)
        lane = board.lane(0, 0)
        lane.begin(1, 0)
        async with serving(Answers(), lane=lane, lifespan="off", access_log=access_log) as worker:
            for path in (b"/", b"/stream", b"/fail"):
                await fetch(worker, CLOSE.replace(b"GET /", b"GET " + path))
            await fetch(worker, b"GARBAGE\r\n\r\n")
            async with await Client.open(worker) as client:
                await client.send(UPGRADE)
                await client.read()
                assert board.read(0, 0).websockets == 1
                await client.send(b"\x88\x80\0\0\0\0")
                assert await client.closes_within(5)
            await eventually(lambda: board.read(0, 0).websockets == 0)
            await eventually(lambda: board.read(0, 0).in_flight == 0)
        totals = board.read(0, 0).totals
        assert totals.statuses == (0, 1, 3, 0, 0, 0, 0)
        assert dict(zip(CAUSES, totals.causes, strict=True)) == {**dict.fromkeys(CAUSES, 0), "app_error": 1}
        assert totals.refused == 1
        assert (totals.duration.total, totals.first_byte.total) == (3, 3)
        assert totals.gap.total == 2  # the first piece goes with the head, the last has no bytes
        assert totals.first_byte.sum_ns <= totals.duration.sum_ns
        assert board.read(0, 0).websockets_total == 1
        board.close()

    run(loop, main)


def test_a_request_over_the_limit_is_tallied(loop: str) -> None:
    async def main() -> None:
        board = Scoreboard.create()
        board.tell_server(watched=1)
        app = App()
        async with serving(app, lane=board.lane(0, 0), limit_concurrency=1) as worker:
            async with await Client.open(worker) as client:
                await client.send(request("slow"))
                await eventually(lambda: "slow" in app.log)
                (refusal,) = await fetch(worker, CLOSE)
                assert refusal.status == 503
                app.go_on.set()
                await client.read_one()
        totals = board.read(0, 0).totals
        assert (totals.limited, totals.statuses[STATUSES.index("5xx")]) == (1, 1)
        board.close()

    run(loop, main)


def test_who_is_not_watched_counts_nothing_until_somebody_comes(loop: str) -> None:
    async def main() -> None:
        board = Scoreboard.create()
        async with serving(hello, lane=board.lane(0, 0), lifespan="off") as worker:
            await fetch(worker, CLOSE)
            assert worker.tally is None
            board.tell_server(watched=1)
            await eventually(lambda: worker.tally is not None)
            await fetch(worker, CLOSE)
        assert board.read(0, 0).requests == 2
        assert board.read(0, 0).totals.duration.total == 1
        board.close()

    run(loop, main)


def test_a_loop_that_stood_still_says_so(loop: str) -> None:
    async def main() -> None:
        board = Scoreboard.create()
        async with serving(hello, lane=board.lane(0, 0), lifespan="off"):
            assert board.read(0, 0).loop_lag_ns == 0
            time.sleep(2.2)
            await asyncio.sleep(0.1)
            late = board.read(0, 0)
            # A tick is a second away at most, so it is at least this late.
            assert 1_100_000_000 < late.loop_lag_ns == late.loop_lag_total_ns
        board.close()

    run(loop, main)


def test_what_is_at_work_is_listed_oldest_first_and_bounded(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, access_log=True) as worker:
            clients = []
            for number in range(25):
                clients.append(await Client.open(worker))
                await clients[-1].send(request("slow?" + "x" * 300))
                await eventually(lambda number=number: len(worker.running) == number + 1)
            listed = worker.list_running()
            assert [each["what"] for each in listed] == ["GET '/slow'"] * 20
            ages = [each["age_s"] for each in listed]
            assert ages == sorted(ages, reverse=True)
            oldest = min(exchange.started for exchange in worker.running)
            assert ages[0] <= time.monotonic() - oldest
            assert ages[-1] > 0
            app.go_on.set()
            for client in clients:
                await client.read_one()
                client.sock.close()
            assert worker.list_running() == []

    run(loop, main)


def test_a_listed_path_is_cut_and_an_age_may_be_unknown(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, lifespan="off") as worker:
            async with await Client.open(worker) as client:
                await client.send(request("slow/" + "/" * 5000))
                await eventually(lambda: "slow" in app.log)
                (listed,) = worker.list_running()
                assert (len(listed["what"]), listed["age_s"]) == (200, None)
                app.go_on.set()
                await client.read_one()

    run(loop, main)


def test_date_is_of_now(loop: str) -> None:
    async def main() -> None:
        from email.utils import parsedate_to_datetime

        async with serving(hello) as worker:
            (response,) = await fetch(worker, CLOSE)
            date = response.get(b"date")
            assert date is not None
            assert abs(parsedate_to_datetime(date.decode()).timestamp() - time.time()) < 5

    run(loop, main)


@pytest.mark.parametrize("line", ["content-length: 5", "Transfer-Encoding: chunked", "connection: close"])
def test_headers_that_are_not_the_operators(line: str) -> None:
    """Framing is decided per response: one for all would break every other response."""
    with pytest.raises(SettingsError, match="header"):
        Settings.build(header=(line,))


def test_unix_socket(loop: str, tmp_path: Any) -> None:
    path = tmp_path / "sock"

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            assert scope["client"] is None
            assert scope["server"] == (str(path), None)
        await hello(scope, receive, send)

    async def main() -> None:
        async with serving(app, listener(socket.AF_UNIX, str(path))) as worker:
            assert worker.addresses == [str(path)]
            assert (await fetch(worker, CLOSE))[0].status == 200
        assert path.exists()  # whoever made it removes it

    run(loop, main)


def test_ipv6(loop: str) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope.get("client"), scope.get("server")))
        await hello(scope, receive, send)

    async def main() -> None:
        async with serving(app, listener(socket.AF_INET6, ("::1", 0))) as worker:
            await fetch(worker, CLOSE)
            client, server = seen[-1]
            assert client[0] == server[0] == "::1"
            assert server[1] == worker.addresses[0][1]
            assert type(client[1]) is int

    run(loop, main)


def test_nodelay_is_set_whatever_the_listener_is(loop: str) -> None:
    """asyncio leaves sockets of a listener with proto 0 alone; Nagle and delayed ACK then cost 40 ms."""

    async def main() -> None:
        async with serving(hello) as worker, await Client.open(worker) as client:
            await client.send(GET)
            await client.read_one()
            (connection,) = worker.connections
            sock = connection.transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    run(loop, main)


# Context and state


def test_context_and_state_of_the_lifespan(loop: str) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            variable.set("lifespan")
            scope["state"]["shared"] = []
            return await hello(scope, receive, send)
        seen.append((variable.get(), sorted(scope["state"])))
        scope["state"]["mine"] = 1
        scope["state"]["shared"].append(1)
        variable.set("request")
        while (await receive()).get("more_body"):
            pass
        return await hello(scope, receive, send)

    async def main() -> None:
        big = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 300000\r\n\r\n" + b"x" * 300000
        async with serving(app) as worker:
            assert len(await fetch(worker, GET, big, GET, CLOSE)) == 4
            assert worker.state == {"shared": [1, 1, 1, 1]}
        assert seen == [("lifespan", ["shared"])] * 4
        assert variable.get() == "none"

    run(loop, main)


# Back-pressure


def test_a_client_that_never_reads(loop: str) -> None:
    async def main() -> None:
        app = App()
        flat = {"cancel_on_disconnect": False}
        async with serving(app, **flat) as worker, await Client.open(worker, receive_buffer=4096) as client:
            await client.send(request("flood"))
            await eventually(lambda: app.sent)
            before = -1
            while app.sent != before:
                before = app.sent
                await asyncio.sleep(0.1)
            (connection,) = worker.connections
            assert connection.gate.full
            assert connection.transport.get_write_buffer_size() < 65536 * 3
            client.reset()
            await eventually(lambda: app.log[-1:] and isinstance(app.log[-1], ClientDisconnected))
            assert not worker.connections

    run(loop, main)


def test_an_application_that_does_not_receive(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app) as worker, await Client.open(worker) as client:
            head = b"POST /slow HTTP/1.1\r\nhost: a\r\ncontent-length: 50000000\r\n\r\n"
            await client.send(head)
            sent = 0
            with contextlib.suppress(TimeoutError):
                while sent < 50_000_000:
                    async with asyncio.timeout(0.5):
                        await client.send(b"x" * 100_000)
                    sent += 100_000
            assert sent < 40_000_000  # the rest waits in the kernel's buffers, and with the client
            (connection,) = worker.connections
            assert not connection.transport.is_reading()
            assert len(connection.exchange.undelivered) < 1_000_000  # type: ignore[union-attr]
            app.go_on.set()
            assert b"connection: close" in await client.read()

    run(loop, main)


# Clients that leave


def test_disconnect_is_heard_and_send_raises(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, cancel_on_disconnect=False) as worker:
            client = await Client.open(worker)
            await client.send(request("listen"))
            await eventually(lambda: worker.running)
            client.reset()
            await eventually(lambda: len(app.log) == 5)
            assert app.log[1:4] == [{"type": "http.disconnect"}] * 3
            assert isinstance(app.log[4], ClientDisconnected)

    run(loop, main)


def test_half_close(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app) as worker, await Client.open(worker) as client:
            await client.send(request("slow") + request("slow"))
            client.shut()
            await eventually(lambda: "slow" in app.log)
            await asyncio.sleep(0.05)
            app.go_on.set()
            assert [response.body for response in await client.read_all()] == [b"plain"] * 2

    run(loop, main)


@pytest.mark.parametrize("body", [b"", b"he"])
def test_fin_within_a_body(loop: str, body: bytes) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, cancel_on_disconnect=False) as worker, await Client.open(worker) as client:
            await client.send(b"POST /listen HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\n" + body)
            client.shut()
            await eventually(lambda: len(app.log) == 5)
            assert isinstance(app.log[-1], ClientDisconnected)
            assert await client.read_all() == []

    run(loop, main)


def _exchanges_and_connections() -> list[object]:
    return [it for it in gc.get_objects() if type(it) in (Connection, HttpExchange)]


def test_resets_leave_nothing_behind(loop: str) -> None:
    """Not even for the cycle collector: 500 requests, each ended by a reset, at every stage."""

    async def main() -> None:
        app = App()
        async with serving(app) as worker:
            refs: list[weakref.ref[Any]] = []
            gc.collect()
            older = set(map(id, _exchanges_and_connections()))
            gc.disable()
            try:
                paths = ["plain", "listen", "flood", "slow", "background"]
                for number in range(500):
                    client = await Client.open(worker)
                    await client.send(request(paths[number % 5])[: 1000 if number % 7 else 20])
                    if number % 3:
                        await asyncio.sleep(0)
                        await asyncio.sleep(0.001)
                    refs += [weakref.ref(connection) for connection in worker.connections]
                    client.reset()
                app.go_on.set()
                await eventually(lambda: not worker.connections and not worker.running)
                app.log.clear()
                del client
                await asyncio.sleep(0.05)
                assert len(refs) >= 250
                assert sum(ref() is not None for ref in refs) == 0
                assert set(map(id, _exchanges_and_connections())) <= older
                assert len(worker.deadlines) == 0
                assert len(worker.deadlines._heap) <= 130
            finally:
                gc.enable()

    run(loop, main)


# Deadlines, in short


def test_deadlines_on_real_time(loop: str) -> None:
    async def main() -> None:
        flat = {
            "first_byte_timeout": 0.1, "header_timeout": 0.2, "keep_alive_timeout": 0.1,
            "linger_timeout": 0.1,
        }  # fmt: skip
        async with serving(hello, **flat) as worker:
            async with await Client.open(worker) as silent:
                assert await silent.read_all() == []
            async with await Client.open(worker) as slow:
                await slow.send(GET[:10])
                assert [response.status for response in await slow.read_all()] == [408]
            async with await Client.open(worker) as idle:
                await idle.send(GET)
                assert [response.status for response in await idle.read_all()] == [200]
            async with await Client.open(worker) as refused:
                await refused.send(b"\x00")
                assert [response.status for response in await refused.read_all()] == [400]
            await eventually(lambda: not worker.connections)

    run(loop, main)


def test_the_idle_timer_looks_at_the_socket_once(loop: str) -> None:
    """A request that arrived while the loop was busy is served, not closed upon."""

    async def main() -> None:
        async with serving(hello, keep_alive_timeout=0.2) as worker, await Client.open(worker) as client:
            await client.send(GET)
            await client.read_one()
            await asyncio.sleep(0.1)
            (connection,) = worker.connections
            client.sock.send(CLOSE)  # in the kernel, unread by the worker, when its timer is due
            connection.deadline_reached()
            assert [response.status for response in await client.read_all()] == [200]

    run(loop, main)


# Limits


def test_limit_concurrency(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, limit_concurrency=2) as worker:
            clients = [await Client.open(worker) for _ in range(2)]
            for client in clients:
                await client.send(request("slow"))
            await eventually(lambda: len(worker.running) == 2)
            async with await Client.open(worker) as third:
                await third.send(request("plain"))
                response = await third.read_one()
                assert (response.status, response.get(b"retry-after")) == (503, b"1")
                app.go_on.set()
                for client in clients:
                    assert (await client.read_one()).status == 200
                    client.sock.close()
                await third.send(request("plain"))
                assert (await third.read_one()).status == 200

    run(loop, main)


def test_pipelined_requests_run_one_at_a_time(loop: str) -> None:
    """The call that has just answered is over before the next request is counted."""

    async def main() -> None:
        async with serving(hello, limit_concurrency=1) as worker:
            assert [answer.status for answer in await fetch(worker, GET, GET, CLOSE)] == [200] * 3
            async with await Client.open(worker) as client:
                await client.send(GET * 3)
                client.sock.shutdown(socket.SHUT_WR)
                assert [answer.status for answer in await client.read_all()] == [200] * 3

    run(loop, main)


@pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="from Python 3.12 on")
def test_an_eager_task_factory() -> None:
    """An application that begins inside create_task would answer before its exchange is known.

    Not on uvloop, which hands these factories an argument that some Pythons' do not know.
    """

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        async with serving(hello) as worker:
            answers = await fetch(worker, *[GET] * 400, CLOSE)
            assert [answer.status for answer in answers] == [200] * 401
            assert not worker.running

    run("asyncio", main)


def test_a_pipelined_body_cut_short_ends_its_exchange(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app) as worker, await Client.open(worker) as client:
            await client.send(request("slow"))
            await eventually(lambda: len(worker.running) == 1)
            await client.send(b"POST /listen HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\npart")
            client.sock.shutdown(socket.SHUT_WR)
            await asyncio.sleep(0.1)
            app.go_on.set()
            assert [answer.status for answer in await client.read_all()] == [200]
            await eventually(lambda: not worker.running and not worker.connections)

    run(loop, main)


@pytest.mark.parametrize("size", [1000, 131072])
def test_who_reads_nothing_stops_a_stream(loop: str, size: int) -> None:
    """asyncio's writelines did not, before Python 3.12.9 and 3.13.2."""
    sent = 0

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while sent < 100_000_000:
            await send({"type": "http.response.body", "body": bytes(size), "more_body": True})
            sent += size

    async def main() -> None:
        async with serving(stream) as worker, await Client.open(worker) as client:
            await client.send(GET)
            await eventually(lambda: any(connection.gate.full for connection in worker.connections))
            assert 0 < sent < 100_000_000

    run(loop, main)


def test_limit_max_requests_calls_once(loop: str) -> None:
    async def main() -> None:
        calls: list[int] = []
        async with serving(hello, limit_max_requests=2, on_full=lambda: calls.append(1)) as worker:
            assert len(await fetch(worker, GET, GET, GET, GET, CLOSE)) == 5
        assert calls == [1]

    run(loop, main)


# Boot


def test_a_failed_startup(loop: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no model"})

    async def main() -> None:
        with listener() as sock:
            worker = Worker(app, Settings(), [sock])
            with pytest.raises(BootFailed, match="no model"):
                await worker.start()
            assert worker.machine.state is WorkerState.STOPPED
            with socket.socket() as probe:
                assert probe.connect_ex(sock.getsockname())  # it never listened

    run(loop, main)


def test_a_listener_that_cannot_listen(loop: str) -> None:
    async def main() -> None:
        app = App()
        with listener() as good, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bad:
            bad.bind(("127.0.0.1", 0))
            worker = Worker(app, Settings(), [good, bad])
            with pytest.raises((OSError, ValueError)):
                await worker.start()
            assert worker.machine.state is WorkerState.STOPPED
        assert app.log == ["lifespan.startup", "lifespan.shutdown"]

    run(loop, main)


def test_it_listens_when_the_application_is_ready(loop: str) -> None:
    ready = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await ready.wait()
        await hello(scope, receive, send)

    async def main() -> None:
        with listener() as sock:
            worker = Worker(app, Settings(), [sock])
            starting = asyncio.ensure_future(worker.start())
            await asyncio.sleep(0.05)
            with socket.socket() as probe:
                assert probe.connect_ex(sock.getsockname())
            ready.set()
            await starting
            assert (await fetch(worker, CLOSE))[0].status == 200
            await worker.drain()

    run(loop, main)


# Drain


def test_drain_finishes_what_runs(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, drain_idle_timeout=0.3) as worker:
            busy, idle, fresh = [await Client.open(worker) for _ in range(3)]
            await busy.send(request("slow"))
            await idle.send(request("plain"))
            assert not (await idle.read_one()).closes
            await eventually(lambda: worker.running and len(worker.connections) == 3)
            draining = asyncio.ensure_future(worker.drain())
            await eventually(lambda: worker.draining)
            await asyncio.sleep(0.1)
            for client in (idle, fresh):  # one more request is answered
                await client.send(request("plain"))
                response = await client.read_one()
                assert (response.body, response.closes) == (b"plain", True)
                assert await client.closes_within(5)
            assert not draining.done()
            app.go_on.set()
            response = (await busy.read_all())[0]
            assert (response.body, response.closes) == (b"plain", True)
            await asyncio.wait_for(draining, 5)
            assert app.log[-1] == "lifespan.shutdown"
            for client in (busy, idle, fresh):
                client.sock.close()

    run(loop, main)


@pytest.mark.parametrize("path", ["stuck", "stubborn", "flood"])
def test_drain_timeout_cuts(loop: str, path: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, drain_timeout=0.2, drain_idle_timeout=0.1) as worker:
            async with await Client.open(worker) as client:
                await client.send(request(path))
                await eventually(lambda: worker.running)
                begin = time.monotonic()
                await worker.drain()
                assert time.monotonic() - begin < 8
                assert app.log[-1] == "lifespan.shutdown"
                if path == "stuck":
                    assert "cancelled" in app.log
                    assert (await client.read_all())[0].status == 503
                else:
                    assert await client.closes_within(5)
            for running in list(worker.running):  # an application that does not let itself be cancelled
                running.task.cancel()
                await asyncio.sleep(0)
                running.task.cancel()
            await eventually(lambda: not worker.running)

    run(loop, main)


def test_hurry(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, pre_stop_delay=30, drain_timeout=60) as worker:
            async with await Client.open(worker) as client:
                await client.send(request("stuck"))
                await eventually(lambda: worker.running)
                draining = asyncio.ensure_future(worker.drain())
                await asyncio.sleep(0.05)
                worker.hurry()
                await asyncio.wait_for(draining, 8)
                assert app.log[-1] == "lifespan.shutdown"

    run(loop, main)


def test_background_work_is_waited_for(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app) as worker, await Client.open(worker) as client:
            await client.send(request("background", b"connection: close\r\n"))
            assert (await client.read_all())[0].body == b"plain"
            await worker.drain()
            assert app.log[-2:] == ["background", "lifespan.shutdown"]

    run(loop, main)


def test_a_response_that_had_begun_does_not_hold_the_drain(loop: str) -> None:
    """Its head could not say "close"; the connection must not idle for the keep-alive time."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await hello(scope, receive, send)
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await asyncio.sleep(0.2)
        return await send({"type": "http.response.body", "body": b"b"})

    async def main() -> None:
        async with serving(app, drain_idle_timeout=0.1, drain_timeout=60) as worker:
            async with await Client.open(worker) as client:
                await client.send(GET)
                await client.read()
                await asyncio.wait_for(worker.drain(), 5)
                assert (await client.read_all())[0].body == b"ab"

    run(loop, main)


def test_drain_while_handshaking_or_silent(loop: str) -> None:
    async def main() -> None:
        async with serving(hello, drain_idle_timeout=0.1) as worker:
            clients = [await Client.open(worker) for _ in range(20)]
            await asyncio.wait_for(worker.drain(), 5)  # they were not even accepted yet
            for client in clients:
                assert await client.closes_within(5)
                client.sock.close()

    run(loop, main)


# What a review found


def test_an_application_that_exits_ends_its_own_request_only(loop: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/exit":
            raise SystemExit(7)
        await hello(scope, receive, send)

    async def main() -> None:
        async with serving(app, lifespan="off") as worker:
            exit_, after = await fetch(
                worker,
                b"GET /exit HTTP/1.1\r\nhost: a\r\n\r\n",
                b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
            )
            assert (exit_.status, after.status) == (500, 200)

    run(loop, main)


def test_who_returns_on_a_disconnect_is_not_at_fault(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def main() -> None:
        flat = {"lifespan": "off", "access_log": True, "cancel_on_disconnect": False}
        async with serving(app, **flat) as worker:
            client = await Client.open(worker)
            await client.send(b"GET /gone HTTP/1.1\r\nhost: a\r\n\r\n", pause=0.05)
            client.reset()
            await eventually(lambda: not worker.running)

    with caplog.at_level("INFO", "leanserve"):
        run(loop, main)
    assert [it.levelname for it in caplog.records if "gone" in it.getMessage()] == ["INFO"]
    assert "499" in caplog.text


def test_an_idle_close_waits_for_a_slow_reader(loop: str) -> None:
    """The keep-alive time is over while the last response is still on its way."""

    async def large(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(20_000_000)})

    async def main() -> None:
        async with serving(large, lifespan="off", keep_alive_timeout=0.1) as worker:
            async with await Client.open(worker, receive_buffer=4096) as client:
                await client.send(GET)
                await asyncio.sleep(0.4)
                (answer,) = await client.read_all()
                assert len(answer.body) == 20_000_000

    run(loop, main)


def test_a_lingering_connection_does_not_hold_the_drain(loop: str) -> None:
    async def main() -> None:
        async with serving(hello, linger_timeout=20.0, drain_idle_timeout=0.1) as worker:
            async with await Client.open(worker) as client:
                await client.send(b"GET / HTTP/1.1\r\nhost: a\r\nX\r\n\r\n")
                assert (await client.read()).startswith(b"HTTP/1.1 400")
                async with asyncio.timeout(10):
                    await worker.drain()

    run(loop, main)
