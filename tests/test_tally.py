"""What is counted comes out again, in the bucket of its time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanserve.tally import CAUSES, LIMITS_S, STATUSES, Histogram, Tally, Totals


def told(tally: Tally) -> Totals:
    words = [0] * 256
    for place, number in tally.take():
        words[place] += number
    return Totals.of(words)


def test_nothing_is_told_of_nothing() -> None:
    assert Tally().take() == []


def test_a_response_in_one_write_counts_in_both_distributions() -> None:
    tally = Tally()
    tally.plain[2].append(0.003)
    totals = told(tally)
    assert dict(zip(STATUSES, totals.statuses, strict=True))["2xx"] == 1
    assert totals.duration == totals.first_byte
    assert totals.duration.total == 1
    assert totals.duration.sum_ns == 3_000_000
    assert totals.gap.total == 0
    assert tally.take() == []


def test_a_stream_has_a_first_byte_of_its_own() -> None:
    tally = Tally()
    tally.add(200, 2.0, 0.5, "client_gone")
    tally.add(0, 1.0, None, "client_gone")
    totals = told(tally)
    assert (totals.duration.total, totals.first_byte.total) == (2, 1)
    assert (totals.duration.sum_ns, totals.first_byte.sum_ns) == (3_000_000_000, 500_000_000)
    assert dict(zip(CAUSES, totals.causes, strict=True))["client_gone"] == 2
    assert dict(zip(STATUSES, totals.statuses, strict=True))["none"] == 1


@pytest.mark.parametrize(
    ("status", "name"), [(0, "none"), (101, "1xx"), (302, "3xx"), (499, "4xx"), (599, "5xx"), (999, "other")]
)
def test_classes_of_statuses(status: int, name: str) -> None:
    tally = Tally()
    tally.add_websocket(status, "")
    totals = told(tally)
    assert {key for key, value in zip(STATUSES, totals.statuses, strict=True) if value} == {name}
    assert totals.duration.total == 0


def test_a_cause_that_has_no_word_is_told_as_other() -> None:
    tally = Tally()
    tally.add(200, 0.0, None, "never heard of")
    tally.add_websocket(200, "nor of this")
    assert dict(zip(CAUSES, told(tally).causes, strict=True))["other"] == 2


def test_refusals() -> None:
    tally = Tally()
    tally.limited += 2
    tally.refused += 3
    totals = told(tally)
    assert (totals.limited, totals.refused) == (2, 3)
    assert tally.take() == []


@given(st.floats(min_value=0, max_value=1e9))
def test_each_time_is_in_its_bucket(seconds: float) -> None:
    tally = Tally()
    tally.add_gap(seconds)
    (place,) = (place for place, number in enumerate(told(tally).gap.buckets) if number)
    limits = (0.0, *LIMITS_S, float("inf"))
    assert limits[place] <= seconds < limits[place + 1]


@given(st.lists(st.floats(min_value=0, max_value=1000), min_size=1), st.sampled_from([0.01, 0.5, 0.9, 1.0]))
def test_a_quantile_is_a_limit_that_the_share_does_not_pass(times: list[float], share: float) -> None:
    tally = Tally()
    for seconds in times:
        tally.add_gap(seconds)
    found = told(tally).gap.quantile(share)
    assert found is not None
    assert sum(seconds < found for seconds in times) >= share * len(times)
    limits = (0.0, *LIMITS_S, float("inf"))
    below = limits[limits.index(found) - 1]
    assert sum(seconds < below for seconds in times) < share * len(times)


def test_a_quantile_of_nothing() -> None:
    assert Histogram((0,) * (len(LIMITS_S) + 1), 0).quantile(0.5) is None


def test_sums_of_two() -> None:
    one, two = Tally(), Tally()
    one.plain[2].append(0.1)
    two.add(500, 0.2, 0.1, "app_error")
    two.add_gap(0.3)
    two.limited = 1
    whole = told(one).plus(Totals.of([0] * 256)).plus(told(two))
    assert (whole.duration.total, whole.first_byte.total, whole.gap.total, whole.limited) == (2, 2, 1, 1)
    assert whole.duration.sum_ns == 300_000_000
    assert sum(whole.statuses) == 2
