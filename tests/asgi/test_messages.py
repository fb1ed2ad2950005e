"""leanserve.asgi.messages: the scope's common part, and how an application's call ends."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.websockets import WebSocketDisconnect

from fakes import FakeService
from leanserve.asgi.cancellation import cancel_task
from leanserve.asgi.forwarded import TrustedProxies
from leanserve.asgi.http import HTTP_EXTENSIONS
from leanserve.asgi.messages import is_disconnect, request_scope, run_app
from leanserve.errors import ClientDisconnected
from leanserve.protocol.events import Headers, Request
from leanserve.transport.peer import Peer


async def nothing(*args: Any) -> None:
    pass


def scope_of(raw_path: bytes = b"/", headers: Headers | None = None, *, tls: Any = None, **facts: Any) -> Any:
    service = FakeService(nothing)
    for name, value in facts.items():
        setattr(service, name, value)
    peer = Peer(("10.0.0.1", 4000), ("10.0.0.2", 80), tls)
    request = Request(b"GET", raw_path, b"q", "1.0", headers or [], forwarded=bool(headers))
    try:
        return request_scope(service, request, peer, "http", service.http_extensions.copy())
    finally:
        service.loop.close()


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b"/a", "/a"), (b"/a%20b", "/a b"), (b"/%C3%A9", "/é"), (b"/a%2Fb", "/a/b"), (b"/%zz", "/%zz"),
        (b"/%ff", "/�"), (b"/a+b", "/a+b"), (b"*", "*"), (b"/%00", "/\0"),
    ],
)  # fmt: skip
def test_path(raw: bytes, path: str) -> None:
    scope = scope_of(raw)
    assert (scope["path"], scope["raw_path"]) == (path, raw)
    assert scope["query_string"] == b"q"
    assert scope["http_version"] == "1.0"


def test_an_application_cannot_change_the_request() -> None:
    """Middleware writes into scope["headers"]; the same request may stand for the next head that is equal."""
    headers = [(b"host", b"a")]
    scope_of(headers=headers)["headers"].append((b"x-user", b"somebody"))
    assert headers == [(b"host", b"a")]


def test_root_path_is_a_prefix_of_path() -> None:
    """ASGI: "root_path ... same as SCRIPT_NAME"; since 2.3 it is included in path."""
    scope = scope_of(b"/a", root_path="/é")
    assert (scope["root_path"], scope["path"]) == ("/é", "/é/a")


def test_tls_makes_the_scheme_and_the_extension() -> None:
    scope = scope_of(tls={"tls_version": 1})
    assert (scope["scheme"], scope["extensions"]["tls"]) == ("https", {"tls_version": 1})
    assert scope_of()["extensions"].keys() == {*HTTP_EXTENSIONS, "leanserve.shutdown"}


@pytest.mark.parametrize("tls", [None, {}])
@pytest.mark.parametrize("proto", [b"http", b"https"])
def test_a_trusted_proxy_decides_client_and_scheme(tls: Any, proto: bytes) -> None:
    headers = [(b"x-forwarded-for", b"203.0.113.7"), (b"x-forwarded-proto", proto)]
    scope = scope_of(headers=headers, tls=tls, proxies=TrustedProxies("10.0.0.1"))
    assert (scope["client"], scope["scheme"]) == (("203.0.113.7", 0), proto.decode())
    other = scope_of(headers=headers, tls=tls, proxies=TrustedProxies("192.0.2.1"))
    assert (other["client"], other["scheme"]) == (("10.0.0.1", 4000), "http" if tls is None else "https")


class Told:
    """Notes what an exchange is told."""

    def __init__(self) -> None:
        self.task = None
        self.told: list[Any] = []

    async def receive(self) -> Any:
        pass

    async def send(self, message: Any) -> None:
        pass

    def app_returned(self, error: Any) -> None:
        self.told.append(error)

    def app_cancelled(self) -> None:
        self.told.append("cancelled")

    def app_ended(self) -> None:
        self.told.append("ended")


def test_an_exchange_is_told_how_its_application_ended() -> None:
    def ended(app: Any) -> list[Any]:
        async def main() -> None:
            task = asyncio.ensure_future(run_app(exchange, app, {}))
            await asyncio.sleep(0)
            if not task.done():
                task.cancel()
            await task

        exchange = Told()
        asyncio.run(main())
        return exchange.told

    async def fails(*args: Any) -> None:
        raise ValueError("x")

    async def exits(*args: Any) -> None:
        sys.exit(1)

    async def stuck(*args: Any) -> None:
        await asyncio.Event().wait()

    assert ended(nothing) == [None, "ended"]
    assert list(map(type, ended(fails))) == [ValueError, str]
    assert list(map(type, ended(exits))) == [SystemExit, str]
    assert ended(stuck) == ["cancelled", "ended"]


@pytest.mark.parametrize("begun", [True, False])
def test_a_cancelled_task_has_always_begun(begun: bool) -> None:
    ended: list[str] = []

    async def task_main() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("finally")

    async def main() -> None:
        task = asyncio.ensure_future(task_main())
        if begun:
            await asyncio.sleep(0)
        cancel_task(asyncio.get_running_loop(), task, "reason")
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert ended == ["finally"]


def test_is_disconnect() -> None:
    gone = ClientDisconnected("gone")
    assert is_disconnect(gone)
    assert is_disconnect(ExceptionGroup("a", [gone, ExceptionGroup("b", [gone])]))
    assert not is_disconnect(ExceptionGroup("a", [gone, ValueError()]))
    assert not is_disconnect(OSError())


def test_is_disconnect_in_the_words_of_a_framework() -> None:
    """Row 31 of docs/reference/demands.md: Starlette raises its own, because of ours or without."""
    assert is_disconnect(ClientDisconnect())
    assert is_disconnect(ExceptionGroup("a", [WebSocketDisconnect(1006), ClientDisconnected("gone")]))
    assert not is_disconnect(HTTPException(400))
