"""Paths that a worker answers itself, and what an application may say about itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from leanserve.errors import SettingsError
from leanserve.scoreboard import Scoreboard
from leanserve.settings import Settings
from served import Client, eventually, fetch, run, serving
from wire import Response

PATHS = {"health_path": "/health", "ready_path": "/ready", "lifespan": "off"}


class App:
    """Notes what it is asked, and says about itself what the test wants."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.go_on = asyncio.Event()
        self.set_ready: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.set_ready = scope["extensions"]["leanserve.worker"]["set_ready"]
        if scope["type"] == "lifespan":
            await receive()
            self.set_ready(False, "the model is cold")
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        self.asked.append(f"{scope['method']} {scope['path']}")
        if scope["path"] == "/slow":
            await self.go_on.wait()
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b"app"})


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def board() -> Iterator[Scoreboard]:
    board = Scoreboard.create()
    yield board
    board.close()


async def get(worker: Any, path: str, method: str = "GET") -> Response:
    line = f"{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    async with await Client.open(worker) as client:
        await client.send(line.encode())
        (response,) = await client.read_all(method.encode())
        return response


@pytest.mark.parametrize("fastpath", [True, False])
def test_the_application_is_not_asked(loop: str, fastpath: bool) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, fastpath=fastpath, **PATHS) as worker:
            answers = {"/health": b"healthy\n", "/ready": b"ready\n", "/ready?full=1": b"ready\n"}
            for path, body in answers.items():
                found = await get(worker, path)
                assert (found.status, found.body) == (200, body)
                head = await get(worker, path, "HEAD")
                assert (head.status, head.body) == (200, b"")
                assert dict(head.headers)[b"content-length"] == b"%d" % len(body)
            assert app.asked == []
            # Anything but a plain look is the application's.
            assert (await get(worker, "/health", "DELETE")).status == 201
            assert (await get(worker, "/health/")).status == 201
            assert (await get(worker, "/HEALTH")).status == 201
            assert app.asked == ["DELETE /health", "GET /health/", "GET /HEALTH"]

    run(loop, main)


def test_without_the_settings_all_is_the_applications(loop: str) -> None:
    async def main() -> None:
        async with serving(App(), lifespan="off") as worker:
            assert [(await get(worker, path)).status for path in ("/health", "/ready")] == [201, 201]

    run(loop, main)


def test_no_limit_holds_for_them(loop: str) -> None:
    async def main() -> None:
        app, full = App(), []
        async with serving(
            app, limit_concurrency=1, limit_max_requests=2, on_full=lambda: full.append(1), **PATHS
        ) as worker:
            async with await Client.open(worker) as client:
                await client.send(b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n")
                await eventually(lambda: bool(app.asked))
                assert (await get(worker, "/other")).status == 503
                assert full == [1]
                for _ in range(3):
                    assert (await get(worker, "/health")).status == 200
                app.go_on.set()
                await client.read_one()
        assert full == [1]

    run(loop, main)


def test_an_application_takes_its_worker_out_and_back(loop: str, board: Scoreboard) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, lane=board.lane(0, 0), **PATHS) as worker:
            assert (await get(worker, "/x")).status == 201
            app.set_ready(False, "no memory for another model")
            answer = await get(worker, "/ready")
            assert (answer.status, answer.body) == (503, b"not ready: no memory for another model\n")
            assert board.read(0, 0).app_not_ready == 1
            assert (await get(worker, "/health")).status == 200
            assert (await get(worker, "/x")).status == 201  # who asks all the same is served
            app.set_ready(False)
            assert (await get(worker, "/ready")).body == b"not ready: the application says so\n"
            app.set_ready(True, "not a reason")
            assert (await get(worker, "/ready")).status == 200
            assert board.read(0, 0).app_not_ready == 0

    run(loop, main)


def test_a_lifespan_may_begin_with_no(loop: str, board: Scoreboard) -> None:
    async def main() -> None:
        app = App()
        lane = board.lane(0, 0)
        lane.begin(1, 0)
        async with serving(app, lane=lane, **{**PATHS, "lifespan": "on"}) as worker:
            assert (await get(worker, "/ready")).body == b"not ready: the model is cold\n"
            assert board.read(0, 0).app_not_ready == 1
            app.set_ready(True)
            assert (await get(worker, "/ready")).status == 200
        lane.tell_app_ready(False)
        lane.begin(2, 1)  # what one worker says of itself does not hold for the next
        assert board.read(0, 0).app_not_ready == 0

    run(loop, main)


def test_a_worker_that_drains_is_not_ready(loop: str) -> None:
    async def main() -> None:
        async with serving(App(), pre_stop_delay=5.0, **PATHS) as worker:
            draining = asyncio.ensure_future(worker.drain())
            await eventually(lambda: worker.draining)
            answer = await get(worker, "/ready")
            assert (answer.status, answer.body) == (503, b"not ready: the worker is draining\n")
            assert (await get(worker, "/health")).status == 200
            worker.hurry()
            await draining

    run(loop, main)


def test_a_websocket_is_the_applications(loop: str) -> None:
    async def main() -> None:
        kinds: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            kinds.append(scope["type"])
            assert scope["extensions"]["leanserve.worker"]["set_ready"]
            await send({"type": "websocket.close"})

        async with serving(app, **PATHS) as worker:
            (answer,) = await fetch(
                worker,
                b"GET /health HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
                b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
            )
            assert (answer.status, kinds) == (403, ["websocket"])

    run(loop, main)


@pytest.mark.parametrize("path", ["", "health", "/a b", "/a?b", "/a#b", "/é", "/a\r\n"])
def test_what_is_no_path(path: str) -> None:
    for name in ("health_path", "ready_path"):
        with pytest.raises(SettingsError, match="must be two paths"):
            Settings.build(**{name: path})


def test_one_path_cannot_be_both() -> None:
    with pytest.raises(SettingsError, match="must be two paths"):
        Settings.build(health_path="/a", ready_path="/a")
