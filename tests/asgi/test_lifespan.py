"""leanserve.asgi.lifespan: every state times every move, and the applications that do it wrong."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI

from leanserve.asgi.lifespan import Lifespan, LifespanMove, LifespanState, _LifespanMachine
from leanserve.errors import BootFailed, IllegalTransition
from leanserve.settings import LoadSettings

App = Callable[[Any, Any, Any], Awaitable[None]]
VAR: contextvars.ContextVar[str] = contextvars.ContextVar("VAR", default="unset")


def test_full_product() -> None:
    for state, move in itertools.product(LifespanState, LifespanMove):
        machine = _LifespanMachine()
        machine.state = state
        if machine.accepts(move):
            assert machine.advance(move) is not state
        else:
            with pytest.raises(IllegalTransition):
                machine.advance(move)
            assert machine.state is state
    final = {LifespanState.STOPPED, LifespanState.FAILED, LifespanState.UNSUPPORTED}
    assert not [pair for pair in _LifespanMachine.TABLE if pair[0] in final]


def run(app: App, **settings: Any) -> tuple[Lifespan, list[str]]:
    """Startup, then shutdown; what happened in between, by the app's own account."""
    lifespan = Lifespan(app, LoadSettings(**settings))

    async def live() -> list[str]:
        states = []
        await lifespan.startup()
        states.append(lifespan.machine.state.name)
        await lifespan.shutdown()
        states.append(lifespan.machine.state.name)
        await lifespan.shutdown()
        assert len(asyncio.all_tasks()) == 1
        return states

    return lifespan, asyncio.run(live())


def fails(app: App, message: str, **settings: Any) -> BootFailed:
    lifespan = Lifespan(app, LoadSettings(**settings))

    async def live() -> None:
        try:
            await lifespan.startup()
        finally:
            assert len(asyncio.all_tasks()) == 1

    with pytest.raises(BootFailed, match=message) as caught:
        asyncio.run(live())
    assert "\n" not in str(caught.value)
    return caught.value


async def plain(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "lifespan"
    assert scope["asgi"] == {"version": "3.0", "spec_version": "2.0"}
    assert (await receive())["type"] == "lifespan.startup"
    scope["state"]["model"] = "loaded"
    VAR.set("from startup")
    await send({"type": "lifespan.startup.complete"})
    assert (await receive())["type"] == "lifespan.shutdown"
    VAR.set("from shutdown")
    await send({"type": "lifespan.shutdown.complete"})


def test_life() -> None:
    lifespan, states = run(plain, lifespan="on")
    assert states == ["RUNNING", "STOPPED"]
    assert lifespan.state == {"model": "loaded"}
    assert repr(lifespan) == "<Lifespan STOPPED>"


def test_requests_see_the_context_of_the_startup() -> None:
    async def live() -> str:
        lifespan = Lifespan(plain, LoadSettings())
        await lifespan.startup()
        seen = lifespan.context.copy().run(VAR.get)
        await lifespan.shutdown()
        return seen

    assert asyncio.run(live()) == "from startup"
    assert VAR.get() == "unset"


def test_off_never_calls_the_app() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    lifespan, states = run(app, lifespan="off")
    assert states == ["UNSUPPORTED", "UNSUPPORTED"]
    assert lifespan.context is not None


async def ignorant(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http", "only http"


async def silent(scope: Any, receive: Any, send: Any) -> None:
    return


async def breaks(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    raise RuntimeError("no GPU")


def test_auto_runs_without(caplog: pytest.LogCaptureFixture) -> None:
    assert run(ignorant)[1] == ["UNSUPPORTED", "UNSUPPORTED"]
    assert run(silent)[1] == ["UNSUPPORTED", "UNSUPPORTED"]
    assert not caplog.records
    assert run(breaks)[1] == ["UNSUPPORTED", "UNSUPPORTED"]
    assert "no GPU" in caplog.text  # it took the event: that may well be a fault, so it is shown


def test_on_insists() -> None:
    fails(ignorant, "raised AssertionError: only http.* before it answered", lifespan="on")
    fails(silent, "returned before it answered lifespan.startup", lifespan="on")
    assert isinstance(fails(breaks, "raised RuntimeError: no GPU", lifespan="on").__cause__, RuntimeError)


def test_startup_failed_is_fatal_in_auto_too() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "model file\nis missing"})

    fails(app, "^the application failed to start: model file is missing$")


def test_framework_failure_names_its_line() -> None:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        raise FileNotFoundError("model.bin")
        yield

    error = fails(
        FastAPI(lifespan=lifespan),
        r"^the application failed to start: FileNotFoundError: model.bin \(.*test_lifespan.py, line \d+\)$",
    )
    assert isinstance(error.__cause__, FileNotFoundError)


def test_framework_life() -> None:
    seen: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        seen.append("start")
        VAR.set("fastapi")
        yield {"model": 1}
        seen.append("stop")

    done, states = run(FastAPI(lifespan=lifespan))
    assert (seen, states, done.state) == (["start", "stop"], ["RUNNING", "STOPPED"], {"model": 1})
    assert done.context.run(VAR.get) == "fastapi"


def test_startup_timeout() -> None:
    cancelled: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.sleep(50)
        finally:
            cancelled.append(True)

    fails(app, "longer than 0.05 s", lifespan_startup_timeout=0.05)
    assert cancelled


def test_cancel_during_startup_ends_the_app() -> None:
    cancelled: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.sleep(50)
        finally:
            cancelled.append(True)

    async def live() -> None:
        lifespan = Lifespan(app, LoadSettings())
        task = asyncio.create_task(lifespan.startup())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cancelled
        await lifespan.shutdown()

    asyncio.run(live())


def stopping(how: Callable[[Any], Awaitable[None]]) -> App:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await how(send)

    return app


def test_shutdown_failures_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def failed(send: Any) -> None:
        await send({"type": "lifespan.shutdown.failed", "message": "could not flush"})

    async def raised(send: Any) -> None:
        raise RuntimeError("broken pipe to the GPU")

    async def hangs(send: Any) -> None:
        await asyncio.sleep(50)

    async def silently(send: Any) -> None:
        return

    assert run(stopping(failed))[1] == ["RUNNING", "FAILED"]
    assert "could not flush" in caplog.text
    assert run(stopping(raised))[1] == ["RUNNING", "STOPPED"]
    assert "broken pipe to the GPU" in caplog.text
    assert run(stopping(hangs), lifespan_shutdown_timeout=0.05)[1] == ["RUNNING", "FAILED"]
    assert "longer than 0.05 s" in caplog.text
    caplog.clear()
    assert run(stopping(silently))[1] == ["RUNNING", "STOPPED"]
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_leaving_early_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})

    async def live() -> None:
        lifespan = Lifespan(app, LoadSettings())
        await lifespan.startup()
        await asyncio.sleep(0.01)
        assert lifespan.machine.state is LifespanState.STOPPED
        await lifespan.shutdown()

    asyncio.run(live())
    assert "left its lifespan early" in caplog.text


@pytest.mark.parametrize(
    "message", ["lifespan.shutdown.complete", "lifespan.nothing", "http.response.start"]
)
def test_wrong_messages_raise_in_the_app(message: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": message})

    fails(app, f"raised AppProtocolError: lifespan message '{message}' while starting", lifespan="on")
