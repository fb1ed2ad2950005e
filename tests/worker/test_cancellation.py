"""Cancellation, on real sockets and both loops: who is cancelled when, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http.client
import os
import random
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread
import fastapi
import fastapi.responses
import flask
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from harness import Certificates
from leanserve.asgi.http import HttpExchange
from leanserve.compat.wsgi import WsgiAdapter
from leanserve.errors import ClientDisconnected
from leanserve.transport.connection import Connection
from leanserve.worker.worker import Worker
from served import LOOPS, Client, eventually, run, serving

START = {"type": "http.response.start", "status": 200, "headers": []}
POST = b"POST /%s HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n"


def get(path: str, extra: str = "") -> bytes:
    return f"GET /{path} HTTP/1.1\r\nhost: a\r\n{extra}\r\n".encode()


def part(data: bytes = b"part", *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


@pytest.fixture(params=list(LOOPS))
def loop(request: pytest.FixtureRequest) -> Any:
    return request.param


class App:
    """Does what the path says, and notes how it was cancelled."""

    def __init__(self) -> None:
        self.begun = 0
        #: (message of the CancelledError, cause in the scope), or what else ended it
        self.ends: list[Any] = []
        self.notes: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        self.begun += 1
        try:
            await getattr(self, scope["path"].strip("/"))(scope, receive, send)
            self.ends.append("returned")
        except asyncio.CancelledError as error:
            self.ends.append((*error.args, scope["extensions"]["leanserve.cancellation"]["cause"]))
            raise
        except ClientDisconnected:
            self.ends.append("disconnected")
            raise

    async def waits(self, scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(30)

    async def held(self, scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await asyncio.sleep(30)

    async def streams(self, scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        while True:
            await send(part())
            await asyncio.sleep(0.01)

    async def silent(self, scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send(part())
        await asyncio.sleep(30)

    async def length(self, scope: Any, receive: Any, send: Any) -> None:
        await send({**START, "headers": [(b"content-length", b"100000")]})
        await send(part())
        await asyncio.sleep(30)

    async def fills(self, scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        while True:
            await send(part(b"x" * 100_000))

    async def reads(self, scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            self.notes.append(message["type"])
            if message["type"] == "http.disconnect":
                break
        self.notes.append((await receive())["type"])

    async def notified(self, scope: Any, receive: Any, send: Any) -> None:
        scope["extensions"]["leanserve.cancellation"]["policy"] = "notify"
        await self.reads(scope, receive, send)
        try:
            await send(START)
        except ClientDisconnected as error:
            self.notes.append(error)

    async def ignores(self, scope: Any, receive: Any, send: Any) -> None:
        scope["extensions"]["leanserve.cancellation"]["policy"] = "ignore"
        self.notes.append((await receive())["type"])
        await asyncio.sleep(0.2)
        await send(START)
        for number in range(3):
            await send(part(more=number < 2))
        await send(part())
        self.notes.append((await receive())["type"])
        self.notes.append((await receive())["type"])

    async def shields(self, scope: Any, receive: Any, send: Any) -> None:
        async def save() -> None:
            await asyncio.sleep(0.2)
            self.notes.append("saved")

        await asyncio.shield(asyncio.ensure_future(save()))

    async def groups(self, scope: Any, receive: Any, send: Any) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.child())
            async with anyio.create_task_group() as other:
                other.start_soon(self.child)
                other.start_soon(self.child)

    async def child(self) -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            self.notes.append("child")
            raise

    async def thread(self, scope: Any, receive: Any, send: Any) -> None:
        await anyio.to_thread.run_sync(time.sleep, 0.4)

    async def threaded(self, scope: Any, receive: Any, send: Any) -> None:
        await self.thread(scope, receive, send)
        self.notes.append("thread")
        await asyncio.sleep(30)

    async def quick(self, scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send(part(b"quick", more=False))

    async def background(self, scope: Any, receive: Any, send: Any) -> None:
        await self.quick(scope, receive, send)
        await asyncio.sleep(0.2)

    async def stubborn(self, scope: Any, receive: Any, send: Any) -> None:
        for _ in range(2):
            try:
                await asyncio.sleep(0.3)
            except asyncio.CancelledError:
                self.notes.append("stays")


GONE = ("client_gone", "client_gone")
LEAVE: dict[str, Callable[[Client], None]] = {
    "reset": Client.reset,
    "close": lambda client: client.sock.close(),
}


async def meets(app: App, worker: Worker, path: bytes, leave: str) -> float:
    """Ask, leave when the application has begun, and say how long its end took."""
    client = await Client.open(worker)
    await client.send(path)
    await eventually(lambda: app.begun)
    await asyncio.sleep(0.1)
    LEAVE[leave](client)
    began = time.monotonic()
    await eventually(lambda: app.ends and not worker.running)
    return time.monotonic() - began


@pytest.mark.parametrize("leave", LEAVE)
@pytest.mark.parametrize("path", ["waits", "held", "streams", "silent", "fills", "reads"])
def test_cancelled_when_the_client_goes(loop: str, path: str, leave: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app) as worker:
            # No time is asserted on these machines; but it cannot be that of any other timer.
            assert await meets(app, worker, get(path), leave) < 5
            assert app.ends == [GONE]
            assert worker.statistics()["running"] == 0

    run(loop, main)


@pytest.mark.parametrize("leave", LEAVE)
def test_cancelled_within_the_request_body(loop: str, leave: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app) as worker:
            await meets(app, worker, POST % b"reads" + b"abc", leave)
            assert app.ends == [GONE]
            assert app.notes == ["http.request"]

    run(loop, main)


def test_a_reset_is_heard_while_reading_is_paused(loop: str) -> None:
    """More of the body than the application takes is in the kernel: the loop reads nothing."""

    async def main() -> None:
        app = App()
        async with serving(app) as worker:
            client = await Client.open(worker)
            await client.send(b"POST /waits HTTP/1.1\r\nhost: a\r\ncontent-length: 900000\r\n\r\n")
            await client.send(b"x" * 300_000)
            await eventually(lambda: app.begun)
            (connection,) = worker.connections
            await eventually(lambda: connection.paused)
            client.reset()
            await eventually(lambda: app.ends)
            assert app.ends == [GONE]

    run(loop, main)


def test_a_reset_in_the_middle_of_a_response_of_known_length(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app) as worker:
            await meets(app, worker, get("length"), "reset")
            assert app.ends == [GONE]

    run(loop, main)


@pytest.mark.parametrize("leave", ["close", "eof"])
def test_tls_has_no_half_close(loop: str, leave: str, certificates: Certificates) -> None:
    async def main() -> None:
        app = App()
        flat = {"ssl_certfile": str(certificates.certificate), "ssl_keyfile": str(certificates.key)}
        async with serving(app, **flat) as worker:
            context = ssl.create_default_context(cafile=str(certificates.authority))
            port = worker.addresses[0][1]
            _reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            writer.write(get("waits"))
            await eventually(lambda: app.begun)
            if leave == "close":
                writer.close()
            else:
                with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as sock:
                    sock.shutdown(socket.SHUT_WR)
            await eventually(lambda: app.ends)
            assert app.ends == [GONE]
            writer.transport.abort()

    run(loop, main)


def test_policies(loop: str) -> None:
    """Of the server, of a path, of a scope."""

    async def main() -> None:
        rules = ["/waits=ignore", "/wa*=cancel", "/st*=notify"]
        for flat, path, ends in (
            ({}, "notified", ["returned"]),
            ({}, "ignores", ["returned"]),
            ({"cancel_on_disconnect": False}, "reads", ["returned"]),
            ({"cancel_on_disconnect": False}, "streams", ["disconnected"]),
            ({"disconnect_policy": rules}, "streams", ["disconnected"]),
            ({"disconnect_policy": rules}, "held", [GONE]),
            ({"disconnect_policy": rules, "cancel_on_disconnect": False}, "reads", ["returned"]),
        ):
            app = App()
            async with serving(app, **flat) as worker:
                await meets(app, worker, get(path), "reset")
                assert app.ends == ends, (flat, path)
                if path == "notified":
                    assert isinstance(app.notes.pop(), ClientDisconnected)
                if path in ("notified", "reads", "ignores"):
                    assert app.notes == ["http.request", "http.disconnect", "http.disconnect"]

    run(loop, main)


def test_who_ignores_is_cancelled_at_the_end_of_the_drain(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, disconnect_policy=["*=ignore"], drain_timeout=0.1) as worker:
            client = await Client.open(worker)
            await client.send(get("waits"))
            await eventually(lambda: app.begun)
            client.reset()
            await eventually(lambda: not worker.connections)
            assert worker.running
            await worker.drain()
            assert app.ends == [("shutdown", "shutdown")]

    run(loop, main)


def test_half_close_still_gets_its_answer(loop: str) -> None:
    """What it is asked in between changes nothing: an interim response, or a zero ahead of a chunk size."""

    async def late(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/stream":
            await send(START)
            await send(part(b"one"))
        await asyncio.sleep(0.2)
        if scope["path"] == "/stream":
            await send(part(b"two"))
        else:
            await send(START)
        await send(part(b"last", more=False))

    async def main() -> None:
        async with serving(late) as worker:
            for path, body, sign in (
                ("late", b"last", b"HTTP/1.1 100 Continue\r\n\r\n"),
                ("stream", b"onetwolast", b"\r\n03\r\ntwo"),
            ):
                async with await Client.open(worker) as client:
                    await client.send(get(path))
                    client.shut()
                    (answer,) = await client.read_all()
                    assert answer.body == body
                    assert sign in client.received

    run(loop, main)


def test_half_close_is_not_asked_when_the_answer_is_quick(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app) as worker, await Client.open(worker) as client:
            await client.send(get("quick"))
            client.shut()
            await client.read_all()
            assert client.received.startswith(b"HTTP/1.1 200")

    run(loop, main)


def test_half_close_of_an_old_client_is_not_asked(loop: str) -> None:
    """RFC 9110 section 15.2: "A server MUST NOT send a 1xx response to an HTTP/1.0 client"."""

    async def main() -> None:
        app = App()
        async with serving(app) as worker, await Client.open(worker) as client:
            await client.send(b"GET /thread HTTP/1.0\r\n\r\n")
            client.shut()
            with contextlib.suppress(AssertionError):
                await client.read_all()
            assert client.received.startswith(b"HTTP/1.1 500")  # it says nothing

    run(loop, main)


def test_half_close_can_mean_gone(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, half_close="disconnect") as worker, await Client.open(worker) as client:
            await client.send(get("waits"))
            await eventually(lambda: app.begun)
            client.shut()
            await eventually(lambda: app.ends)
            assert app.ends == [GONE]

    run(loop, main)


def test_the_second_of_two_pipelined_requests_is_asked_too(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app) as worker:
            client = await Client.open(worker)
            await client.send(get("thread") + get("waits"))
            await eventually(lambda: app.begun)
            client.shut()
            await eventually(lambda: app.begun == 2)
            client.reset()
            await eventually(lambda: not worker.running and not worker.connections)
            assert app.ends == ["returned", GONE]

    run(loop, main)


def test_shield_and_task_groups(loop: str) -> None:
    async def main() -> None:
        for path, notes in (("shields", ["saved"]), ("groups", ["child"] * 3)):
            app = App()
            async with serving(app) as worker:
                await meets(app, worker, get(path), "reset")
                assert app.ends == [GONE]
                await eventually(lambda app=app, notes=notes: app.notes == notes)

    run(loop, main)


def test_a_slot_is_taken_until_the_thread_ends(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app) as worker:
            client = await Client.open(worker)
            await client.send(get("threaded"))
            await eventually(lambda: app.begun)
            await asyncio.sleep(0.05)
            client.reset()
            await eventually(lambda: not worker.connections)
            assert worker.running
            await eventually(lambda: not worker.running)
            assert (app.ends, app.notes) == ([GONE], ["thread"])

    run(loop, main)


def test_background_work_is_not_cancelled(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app) as worker:
            client = await Client.open(worker)
            await client.send(get("background"))
            await client.read_one()
            client.reset()
            await eventually(lambda: app.ends)
            assert app.ends == ["returned"]

    run(loop, main)


def test_who_swallows_a_cancellation_runs_on(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app) as worker:
            await meets(app, worker, get("stubborn"), "reset")
            assert (app.ends, app.notes) == (["returned"], ["stays"])

    run(loop, main)


@pytest.mark.parametrize("path", ["plain", "stream", "body"])
def test_under_middleware_of_starlette(loop: str, path: str) -> None:
    ends: list[Any] = []

    async def work() -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError as error:
            ends.append(error.args)
            raise

    async def plain(request: Request) -> PlainTextResponse:
        await work()
        return PlainTextResponse("late")

    async def body(request: Request) -> PlainTextResponse:
        await request.body()
        return await plain(request)

    async def stream(request: Request) -> StreamingResponse:
        async def pieces() -> Any:
            yield b"first"
            await work()

        return StreamingResponse(pieces())

    async def passes(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    routes = [Route("/plain", plain), Route("/stream", stream), Route("/body", body, methods=["POST"])]
    layers = [Middleware(BaseHTTPMiddleware, dispatch=passes) for _ in range(3)]
    app = Starlette(routes=routes, middleware=layers)

    async def main() -> None:
        for leave in LEAVE:
            ends.clear()
            async with serving(app) as worker:
                client = await Client.open(worker)
                await client.send(POST % b"body" + b"123456789" if path == "body" else get(path))
                await eventually(lambda: worker.running)
                await asyncio.sleep(0.1)
                LEAVE[leave](client)
                await eventually(lambda: not worker.running)
                assert len(ends) == 1, leave

    run(loop, main)


def _ours() -> list[object]:
    return [it for it in gc.get_objects() if type(it) in (Connection, HttpExchange)]


def test_ten_thousand_cancelled_requests_leave_nothing_behind(loop: str) -> None:
    """At random places of the request and of the response, with the cycle collector off."""
    dice = random.Random(2611)
    paths = ["waits", "held", "streams", "silent", "reads", "shields_not", "quick", "background"]

    class Many(App):
        shields_not = App.length

    async def one(worker: Worker, refs: list[weakref.ref[Any]]) -> None:
        client = await Client.open(worker)
        path = dice.choice(paths)
        head = get(path) if dice.random() < 0.6 else POST % path.encode() + b"123456789"
        if dice.random() < 0.2:
            head += get(dice.choice(paths))
        await client.send(head[: dice.randrange(len(head) + 1)] if dice.random() < 0.3 else head)
        for _ in range(dice.choice((0, 1, 2, 5))):
            await asyncio.sleep(0)
        if dice.random() < 0.3:
            await asyncio.sleep(dice.random() * 0.02)
        refs += [weakref.ref(it) for it in worker.connections]
        LEAVE[dice.choice(("reset", "close"))](client)

    async def several(worker: Worker, refs: list[weakref.ref[Any]], count: int) -> None:
        for _ in range(count):
            await one(worker, refs)

    async def main() -> None:
        app = Many()
        async with serving(app, linger_timeout=0.1) as worker:
            await several(worker, [], 20)
            await eventually(lambda: not worker.connections and not worker.running)
            gc.collect()
            older = set(map(id, _ours()))
            refs: list[weakref.ref[Any]] = []
            gc.disable()
            try:
                for _ in range(10):
                    async with asyncio.TaskGroup() as group:
                        for _ in range(20):
                            group.create_task(several(worker, refs, 50))
                    del group
                    await eventually(lambda: not worker.connections and not worker.running)
                    assert all(ref() is None for ref in refs)
                    refs.clear()
                app.ends.clear()
                await asyncio.sleep(0.05)
                assert app.begun > 5000
                assert worker.statistics()["running"] == 0
                assert len(worker.deadlines) == 0
                assert set(map(id, _ours())) <= older
                assert asyncio.all_tasks() == {asyncio.current_task()}
                assert worker.hangups is None or not (worker.hangups._watched or worker.hangups._numbers)
            finally:
                gc.enable()

    run(loop, main)


def test_threads_see_the_shutdown(loop: str) -> None:
    """The event of the scope is set as soon as the drain begins; the stream then has the whole drain time."""
    told = threading.Event()

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        event = scope["extensions"]["leanserve.shutdown"]["event"]
        await send(START)
        while not event.is_set():
            await send(part())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await event.wait()
        told.set()
        await send(part(b"bye", more=False))

    async def main() -> None:
        async with serving(stream, lifespan="off", drain_timeout=10) as worker:
            async with await Client.open(worker) as client:
                await client.send(get("stream"))
                await client.read()
                assert not told.is_set()
                await worker.drain()
                assert told.is_set()
                (answer,) = await client.read_all()
                assert answer.body.endswith(b"bye")

    run(loop, main)


@pytest.mark.parametrize("end", ["deadline", "app_error", "drain", "stubborn"])
def test_a_cut_behind_a_question_does_not_look_complete(loop: str, end: str) -> None:
    """A lone zero and the end of the connection end a body, say lenient clients: they get a reset."""
    over = asyncio.Event()

    async def streams(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send(part(b"one"))
        await asyncio.sleep(0.3)
        if end == "app_error":
            raise ValueError("told to")
        try:
            await over.wait()
        except asyncio.CancelledError:
            if end == "stubborn":
                await over.wait()
            raise

    def fetch(port: int) -> Any:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        client.request("GET", "/")
        client.sock.shutdown(socket.SHUT_WR)
        try:
            return client.getresponse().read()
        except (ConnectionError, http.client.HTTPException) as error:
            return type(error)
        finally:
            client.close()

    async def main() -> None:
        flat = {"request_timeout": 0.4} if end == "deadline" else {"drain_timeout": 0.4}
        async with serving(streams, **flat, lifespan="off") as worker:
            answer = asyncio.create_task(asyncio.to_thread(fetch, worker.addresses[0][1]))
            await eventually(lambda: worker.running)
            if end in ("drain", "stubborn"):
                await asyncio.sleep(0.2)
                await worker.drain()
            assert await answer is ConnectionResetError
            over.set()
            await eventually(lambda: not worker.running)

    run(loop, main)


def test_at_the_end_of_the_drain_nothing_looks_complete(loop: str) -> None:
    """To a client of HTTP/1.0 the end of the connection is the end of the body."""
    over = asyncio.Event()

    async def streams(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send(part())
        while not over.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await over.wait()

    async def main() -> None:
        async with serving(streams, lifespan="off", drain_timeout=0.1) as worker:
            async with await Client.open(worker) as client:
                await client.send(b"GET / HTTP/1.0\r\n\r\n")
                await client.read()
                await worker.drain()
                over.set()
                await eventually(lambda: not worker.running)
                with pytest.raises(ConnectionResetError):
                    await client.read_all()

    run(loop, main)


def test_a_client_that_half_closed_behind_an_unread_body_reads_its_answer_to_the_end(loop: str) -> None:
    """Both sides are closed then, which epoll tells as it tells a reset; but nobody has reset anything."""
    begun: list[Any] = []
    answer = b"too much" * 30_000

    async def refuses(scope: Any, receive: Any, send: Any) -> None:
        begun.append(scope)
        await asyncio.sleep(0.1)
        await send({**START, "status": 413})
        await send(part(answer, more=False))

    async def main() -> None:
        async with serving(refuses, lifespan="off") as worker:
            for _ in range(5):
                begun.clear()
                async with await Client.open(worker, receive_buffer=4096) as client:
                    await client.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 120000\r\n\r\n")
                    await client.send(b"x" * 80_000)
                    await eventually(lambda: begun and next(iter(worker.connections)).paused)
                    await client.send(b"x" * 40_000)
                    client.shut()
                    await asyncio.sleep(0.3)
                    (got,) = await client.read_all(b"POST")
                    assert (got.status, got.body) == (413, answer)

    run(loop, main)


class Frameworks:
    """Handlers without ``async``, in threads: each runs for a while, says how many run, and notes its end."""

    def __init__(self) -> None:
        self.running = 0
        self.ended = 0
        self.lock = threading.Lock()
        self.over = threading.Event()

    def work(self) -> None:
        with self.lock:
            self.running += 1
        self.over.wait(20)
        with self.lock:
            self.running -= 1
            self.ended += 1

    def fastapi(self) -> Any:
        app = fastapi.FastAPI()

        @app.get("/plain")
        def plain() -> str:
            self.work()
            return "late"

        @app.get("/stream")
        def stream() -> Any:
            def pieces() -> Any:
                yield b"first"
                self.work()
                yield b"last"

            return fastapi.responses.StreamingResponse(pieces())

        def before() -> Any:
            self.work()
            yield 1

        @app.get("/before")
        async def depends(found: int = fastapi.Depends(before)) -> int:
            return found

        def behind() -> Any:
            yield 1
            self.work()

        @app.get("/behind")
        async def behind_it(found: int = fastapi.Depends(behind, scope="function")) -> int:
            return found

        return app

    def wrapped(self) -> Any:
        app = self.fastapi()

        @app.middleware("http")
        async def passes(request: Any, call_next: Any) -> Any:
            return await call_next(request)

        return app

    def flask(self) -> Any:
        app = flask.Flask("here")

        @app.route("/plain")
        def plain() -> str:
            self.work()
            return "late"

        @app.route("/stream")
        def stream() -> Any:
            def pieces() -> Any:
                yield b"first"
                self.work()
                yield b"last"

            return flask.Response(pieces())

        return WsgiAdapter(app)


@pytest.mark.parametrize(
    ("kind", "path"),
    [(kind, path) for kind in ("fastapi", "wrapped") for path in ("plain", "stream", "before", "behind")]
    + [("flask", "plain"), ("flask", "stream")],
)
def test_a_slot_is_taken_until_the_handler_in_its_thread_has_ended(loop: str, kind: str, path: str) -> None:
    """The client leaves: the next request waits for its turn all the same, as long as the thread runs."""

    async def main() -> None:
        works = Frameworks()
        flat = {"max_concurrent_requests": 1, "max_queue": 9, "lifespan": "off"}
        async with serving(getattr(works, kind)(), **flat) as worker:
            client = await Client.open(worker)
            await client.send(get(path))
            await eventually(lambda: works.running == 1)
            client.reset()
            await eventually(lambda: not worker.connections)
            async with await Client.open(worker) as second:
                await second.send(get("nowhere", "connection: close\r\n"))
                await asyncio.sleep(0.2)
                assert (works.running, len(worker.running)) == (1, 2)
                works.over.set()
                assert [answer.status for answer in await second.read_all()] == [404]
                assert (works.running, works.ended) == (0, 1)
            await eventually(lambda: not worker.running)

    run(loop, main)


ONE = {"max_concurrent_requests": 1, "max_queue": 9, "lifespan": "off"}


class Turns:
    """Keeps its slot until it is told to go on."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ends: list[Any] = []
        self.go_on = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun.append(scope["path"])
        try:
            await self.go_on.wait()
            await send(START)
            await send(part(b"done", more=False))
        except asyncio.CancelledError as error:
            self.ends.append(error.args)
            raise


def test_the_time_of_a_request_runs_while_it_waits_for_its_turn(loop: str) -> None:
    """It ends there: 504, the place is free again, and the application has not been called."""

    async def main() -> None:
        app = Turns()
        async with serving(app, **ONE) as worker:
            async with await Client.open(worker) as first, await Client.open(worker) as second:
                await first.send(get("first"))
                await eventually(lambda: app.begun)
                await second.send(get("second", "request-timeout: 0.2\r\n"))
                assert (await second.read_one()).status == 504
                await eventually(lambda: len(worker.running) == 1)
                assert "0 waiting" in repr(worker.admission)
                await second.send(get("third"))
                await eventually(lambda: len(worker.running) == 2)
                app.go_on.set()
                assert [(await it.read_one()).status for it in (first, second)] == [200, 200]
                assert (app.begun, app.ends) == (["/first", "/third"], [])
            await eventually(lambda: not worker.connections)
            assert len(worker.deadlines) == 0

    run(loop, main)


def test_what_runs_on_without_its_client_keeps_its_turn(loop: str) -> None:
    """A job that is to be done though nobody hears of it (policy ignore) does not leave the queue."""

    async def main() -> None:
        app = Turns()
        async with serving(app, disconnect_policy=["/kept=ignore"], **ONE) as worker:
            async with await Client.open(worker) as first:
                await first.send(get("first"))
                await eventually(lambda: app.begun)
                for path in ("kept", "left"):
                    client = await Client.open(worker)
                    await client.send(get(path))
                    await eventually(lambda path=path: len(worker.running) == (2 if path == "kept" else 3))
                    client.reset()
                    await eventually(lambda: len(worker.connections) == 1)
                await eventually(lambda: len(worker.running) == 2)
                app.go_on.set()
                await eventually(lambda: not worker.running)
                assert app.begun == ["/first", "/kept"]

    run(loop, main)


async def leaves_a_body_unread(worker: Worker, begun: Callable[[], Any]) -> Client:
    """More of it than the application takes: the rest is in the kernel."""
    client = await Client.open(worker)
    await client.send(b"POST /body HTTP/1.1\r\nhost: a\r\ncontent-length: 120000\r\n\r\n")
    await client.send(b"x" * 80_000)
    await eventually(lambda: begun() and any(connection.paused for connection in worker.connections))
    await client.send(b"x" * 40_000)
    return client


@pytest.mark.parametrize("half_close", ["deliver", "disconnect"])
def test_a_close_behind_an_unread_body_is_heard(loop: str, half_close: str) -> None:
    async def main() -> None:
        app = Turns()
        async with serving(app, half_close=half_close, lifespan="off") as worker:
            client = await leaves_a_body_unread(worker, lambda: app.begun)
            client.sock.close()
            await eventually(lambda: app.ends)
            assert app.ends == [("client_gone",)]

    run(loop, main)


def test_a_half_close_behind_an_unread_body_gets_its_answer(loop: str) -> None:
    """It is asked while nobody reads the body, which then is read to the end."""
    go_on = asyncio.Event()
    begun: list[Any] = []

    async def counts(scope: Any, receive: Any, send: Any) -> None:
        begun.append(scope)
        await go_on.wait()
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
        await send(START)
        await send(part(b"%d" % size, more=False))

    async def main() -> None:
        async with serving(counts, body_timeout=1, lifespan="off") as worker:
            async with await leaves_a_body_unread(worker, lambda: begun) as client:
                client.shut()
                await client.read()
                assert client.received == b"HTTP/1.1 100 Continue\r\n\r\n"
                go_on.set()
                (answer,) = await client.read_all(b"POST")
                assert answer.body == b"120000"

    run(loop, main)


def test_a_waiter_with_an_unread_body_that_closes_leaves_the_queue(loop: str) -> None:
    async def main() -> None:
        app = Turns()
        async with serving(app, **ONE) as worker:
            async with await Client.open(worker) as first:
                await first.send(get("first"))
                await eventually(lambda: app.begun)
                client = await leaves_a_body_unread(worker, lambda: len(worker.running) == 2)
                client.sock.close()
                await eventually(lambda: len(worker.running) == 1)
                app.go_on.set()
                await first.read_one()
                assert app.begun == ["/first"]

    run(loop, main)
