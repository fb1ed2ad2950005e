"""leanserve.worker.lifetime: when a worker asks for a successor."""

from __future__ import annotations

import pytest

from leanserve.settings import WorkerSettings
from leanserve.worker.lifetime import Lifetime


@pytest.mark.parametrize("jitter", [0, 5])
def test_full_is_said_once_at_the_limit_or_up_to_jitter_later(jitter: int) -> None:
    calls: list[int] = []
    settings = WorkerSettings(limit_max_requests=10, limit_max_requests_jitter=jitter)
    begun: list[int] = []
    lifetime = Lifetime(settings, lambda: calls.append(len(begun)))
    for number in range(1, 40):
        begun.append(number)
        lifetime.count()
    assert len(calls) == 1
    assert 10 <= calls[0] <= 10 + jitter


def test_full_without_anybody_to_tell() -> None:
    lifetime = Lifetime(WorkerSettings(limit_max_requests=1), None)
    lifetime.count()
    lifetime.count()


def test_without_a_limit() -> None:
    lifetime = Lifetime(WorkerSettings(), pytest.fail)
    for _ in range(1000):
        lifetime.count()
