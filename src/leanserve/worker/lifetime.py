"""How many requests a worker begins in its life before it asks for a successor."""

from __future__ import annotations

from collections.abc import Callable

from leanserve.settings import WorkerSettings

__all__ = ["Lifetime"]


class Lifetime:
    """Counts requests, refused ones too.

    Args:
        settings: the limit and its jitter.
        on_full: called once, when the worker has begun as many requests as it should in its life.
    """

    __slots__ = ("_begun", "_on_full", "_retire_at")

    def __init__(self, settings: WorkerSettings, on_full: Callable[[], None] | None) -> None:
        self._begun = 0
        self._on_full = on_full
        self._retire_at: int | None = None
        if settings.limit_max_requests is not None:
            import random  # with its hashes; few workers ever come here

            jitter = random.randint(0, settings.limit_max_requests_jitter)
            self._retire_at = settings.limit_max_requests + jitter

    def count(self) -> None:
        """Another request has begun. Beyond the limit they are served too: the successor may not be ready."""
        self._begun += 1
        if self._begun == self._retire_at and self._on_full is not None:
            self._on_full()
