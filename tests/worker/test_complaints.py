"""leanserve.worker.complaints: bad peers are named, and cannot fill the log."""

from __future__ import annotations

import logging

import pytest

from leanserve.worker import complaints
from leanserve.worker.complaints import Complaints

LOGGER = logging.getLogger("leanserve.test")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(complaints.time, "monotonic", lambda: now[0])
    return now


def test_limit_per_second_and_a_summary(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    it = Complaints(LOGGER, per_second=3)
    with caplog.at_level(logging.INFO, LOGGER.name):
        for number in range(10):
            it.add("bad peer %s", number)
        clock[0] += 0.5
        it.add("still the same second")
        assert len(caplog.records) == 3
        clock[0] += 0.5
        it.add("next")
    assert [entry.getMessage() for entry in caplog.records] == [
        "bad peer 0", "bad peer 1", "bad peer 2", "8 more refusals not logged", "next",
    ]  # fmt: skip


def test_no_summary_when_nothing_was_left_out(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    it = Complaints(LOGGER, per_second=3)
    with caplog.at_level(logging.INFO, LOGGER.name):
        it.add("one")
        clock[0] += 5
        it.add("two")
    assert [entry.getMessage() for entry in caplog.records] == ["one", "two"]


def test_what_a_peer_sent_cannot_forge_lines(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    it = Complaints(LOGGER)
    with caplog.at_level(logging.INFO, LOGGER.name):
        it.add("refused %s: %s", ("192.0.2.1", 5), "bad\r\nINFO all is well \x1b[31m é")
    text = caplog.records[0].getMessage()
    assert text == "refused ('192.0.2.1', 5): bad\\r\\nINFO all is well \\x1b[31m \\xe9"
