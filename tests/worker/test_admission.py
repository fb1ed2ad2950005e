"""leanserve.worker.admission: how much a worker takes on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from leanserve.settings import WorkerSettings
from leanserve.worker.admission import Admission, overloaded


def test_without_limits_everybody_is_admitted() -> None:
    admission = Admission(WorkerSettings(), None)
    assert all(admission.admit(10**6) for _ in range(100))


def test_concurrency() -> None:
    admission = Admission(WorkerSettings(limit_concurrency=2), None)
    assert [admission.admit(running) for running in (0, 1, 2, 3, 1)] == [True, True, False, False, True]


@pytest.mark.parametrize("jitter", [0, 5])
def test_full_is_said_once_at_the_limit_or_up_to_jitter_later(jitter: int) -> None:
    calls: list[int] = []
    settings = WorkerSettings(limit_max_requests=10, limit_max_requests_jitter=jitter)
    begun: list[int] = []
    admission = Admission(settings, lambda: calls.append(len(begun)))
    for number in range(1, 40):
        begun.append(number)
        assert admission.admit(0)  # full is no reason to refuse: the successor may not be ready
    assert len(calls) == 1
    assert 10 <= calls[0] <= 10 + jitter


def test_full_without_anybody_to_tell() -> None:
    admission = Admission(WorkerSettings(limit_max_requests=1), None)
    assert admission.admit(0)
    assert admission.admit(0)


@pytest.mark.parametrize(("kind", "prefix"), [("http", "http"), ("websocket", "websocket.http")])
def test_overloaded(kind: str, prefix: str) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(overloaded({"type": kind}, None, send))
    assert [message["type"] for message in sent] == [f"{prefix}.response.start", f"{prefix}.response.body"]
    assert sent[0]["status"] == 503
    assert dict(sent[0]["headers"])[b"content-length"] == b"%d" % len(sent[1]["body"])
