"""How much a worker takes on: the concurrency limit and the number of requests in its life."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from leanserve.settings import WorkerSettings

__all__ = ["Admission", "overloaded"]


class Admission:
    """Counts requests and says no to the one too many.

    Args:
        settings: the limits.
        on_full: called once, when the worker has begun as many requests as it should in its life.
    """

    __slots__ = ("_begun", "_limit", "_on_full", "_retire_at")

    def __init__(self, settings: WorkerSettings, on_full: Callable[[], None] | None) -> None:
        self._limit = settings.limit_concurrency
        self._begun = 0
        self._on_full = on_full
        self._retire_at: int | None = None
        if settings.limit_max_requests is not None:
            import random  # with its hashes; few workers ever come here

            jitter = random.randint(0, settings.limit_max_requests_jitter)
            self._retire_at = settings.limit_max_requests + jitter

    def admit(self, running: int) -> bool:
        """Whether another request may begin while `running` are at work. A refused one counts as begun."""
        self._begun += 1
        if self._begun == self._retire_at and self._on_full is not None:
            self._on_full()
        return self._limit is None or running < self._limit


async def overloaded(scope: Any, receive: Any, send: Any) -> None:
    """What answers in the application's place beyond the limit: 503, before anything is read."""
    prefix = "websocket.http" if scope["type"] == "websocket" else "http"
    body = b"Service Unavailable"
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", b"%d" % len(body)),
        (b"retry-after", b"1"),
    ]
    await send({"type": f"{prefix}.response.start", "status": 503, "headers": headers})
    await send({"type": f"{prefix}.response.body", "body": body})
