"""leanserve.worker.lifetime: when a worker asks for a successor."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanserve.settings import RecycleSettings
from leanserve.worker import lifetime
from leanserve.worker.lifetime import Lifetime, has_end, resident_bytes


@pytest.mark.parametrize("jitter", [0, 5])
def test_full_is_said_once_at_the_limit_or_up_to_jitter_later(jitter: int) -> None:
    calls: list[int] = []
    settings = RecycleSettings(limit_max_requests=10, limit_max_requests_jitter=jitter)
    begun: list[int] = []
    it = Lifetime(settings, lambda: calls.append(len(begun)))
    for number in range(1, 40):
        begun.append(number)
        it.count()
    assert len(calls) == 1
    assert 10 <= calls[0] <= 10 + jitter


def test_full_without_anybody_to_tell() -> None:
    it = Lifetime(RecycleSettings(limit_max_requests=1), None)
    it.count()
    it.count()
    it.look(1e9)


def test_without_a_limit_jitter_does_nothing() -> None:
    jitter = RecycleSettings(limit_max_requests_jitter=5, limit_jitter=0.9)
    assert not has_end(jitter)
    it = Lifetime(jitter, pytest.fail, 0.0)
    for number in range(1000):
        it.count()
        it.look(number * 1e6)


@pytest.mark.parametrize(
    "limit", ["limit_max_requests", "limit_max_age", "limit_max_rss", "limit_max_gpu_memory"]
)
def test_one_limit_is_an_end(limit: str) -> None:
    assert has_end(RecycleSettings(**{limit: 1}))


def full_at(settings: RecycleSettings, until: int) -> list[int]:
    """The seconds at which a worker that was born at 1000 asks."""
    calls: list[int] = []
    now = 1000
    it = Lifetime(settings, lambda: calls.append(now), float(now))
    for second in range(until):
        now = 1000 + second
        it.look(float(now))
    return calls


def test_age() -> None:
    assert full_at(RecycleSettings(limit_max_age=50, limit_jitter=0), 60) == [1050]


def test_age_with_jitter_is_less_and_differs() -> None:
    settings = RecycleSettings(limit_max_age=1000, limit_jitter=0.5)
    ages = [full_at(settings, 1010)[0] - 1000 for _ in range(20)]
    assert all(500 <= age <= 1000 for age in ages)
    assert len(set(ages)) > 5


def test_it_asks_again_each_minute_while_it_goes_on() -> None:
    """Its successor may have failed; then what was said once must not be forgotten for ever."""
    assert full_at(RecycleSettings(limit_max_age=50, limit_jitter=0), 200) == [1050, 1110, 1170]


def test_resident_memory() -> None:
    before = resident_bytes()
    status = Path("/proc/self/status").read_text()
    assert abs(before - int(status.partition("VmRSS:")[2].split()[0]) * 1024) < 8 << 20
    limit = before + (32 << 20)
    calls: list[int] = []
    it = Lifetime(RecycleSettings(limit_max_rss=limit, limit_jitter=0), lambda: calls.append(1), 0.0)
    it.look(1.0)
    assert not calls
    held = b"x" * (64 << 20)
    it.look(2.0)
    it.look(3.0)
    assert len(calls) == 1
    assert len(held) == 64 << 20


def test_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    now = resident_bytes()
    monkeypatch.setattr(lifetime, "_STATM", "/nosuch")
    assert now <= resident_bytes() < 100 * now  # the most that it ever was, in the same unit


def test_a_limit_with_jitter_is_never_exceeded() -> None:
    """The limit of memory may be all that there is: a worker asks before, not behind it."""
    calls: list[int] = []
    settings = RecycleSettings(limit_max_rss=resident_bytes() // 2, limit_jitter=0.9)
    Lifetime(settings, lambda: calls.append(1), 0.0).look(1.0)
    assert calls == [1]


def test_why_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "leanserve"):
        Lifetime(RecycleSettings(limit_max_rss=1), lambda: None, 0.0).look(1.0)
    assert "MiB of resident memory" in caplog.text
