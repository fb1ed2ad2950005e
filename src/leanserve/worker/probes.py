"""Paths that a worker answers itself: whether its loop runs, and whether it should get requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from leanserve.asgi.messages import App
from leanserve.protocol.events import Request
from leanserve.settings import AdminSettings

__all__ = ["Probes"]


class Probes:
    """Finds the answer to a request that is meant for the server and not for the application.

    Args:
        settings: has the paths.
        why_not: says why the worker should get no requests; "" when it should.
    """

    __slots__ = ("_apps", "_why_not")

    def __init__(self, settings: AdminSettings, why_not: Callable[[], str]) -> None:
        self._why_not = why_not
        paths = ((settings.health_path, self._health), (settings.ready_path, self._ready))
        self._apps: dict[bytes, App] = {path.encode(): app for path, app in paths if path is not None}

    def find(self, request: Request) -> App | None:
        """What answers in the application's place: a plain GET or HEAD of one of the paths."""
        if request.method not in (b"GET", b"HEAD") or request.upgrade:
            return None
        return self._apps.get(request.raw_path)

    async def _health(self, scope: Any, receive: Any, send: Any) -> None:
        await _answer(send, 200, b"healthy\n")

    async def _ready(self, scope: Any, receive: Any, send: Any) -> None:
        why_not = self._why_not()
        if why_not:
            await _answer(send, 503, b"not ready: %s\n" % why_not.encode())
        else:
            await _answer(send, 200, b"ready\n")


async def _answer(send: Any, status: int, body: bytes) -> None:
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
