"""/metrics as Prometheus' own reader reads it; and that no counter ever goes back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from docs.documents import code, read, table
from leanserve.admin.metrics import METRICS, Facts, write_metrics
from leanserve.admin.view import look
from leanserve.scoreboard import Scoreboard, WorkerState
from leanserve.settings import AdminSettings
from leanserve.tally import LIMITS_S, Tally

S = 1_000_000_000


@pytest.fixture
def board() -> Iterator[Scoreboard]:
    board = Scoreboard.create()
    board.tell_server(pid=9, born_ns=5 * S, ready_ns=6 * S, slots=2, crashes=1, restarts=3)
    yield board
    board.close()


def serve_some(board: Scoreboard, slot: int, generation: int = 0) -> None:
    lane = board.lane(slot, 0)
    lane.begin(100 + slot, generation)
    lane.enter(WorkerState.READY, 6 * S)
    lane.beat(8 * S)
    lane.connection_opened()
    lane.websocket_opened()
    lane.tell_in_flight(1)
    lane.count_done(2, 30, 4000)
    lane.tell_lag(S // 4)
    lane.tell_fastpath(9, 1, 0, 0)
    tally = Tally()
    tally.plain[2].append(0.0015)
    tally.add(500, 3.0, 1.0, "app_error")
    tally.add_gap(0.2)
    tally.limited += 1
    tally.refused += 2
    lane.tell_tally(tally)


def families(board: Scoreboard, expiry: float | None = None) -> dict[str, Family]:
    view = look(board, 9 * S)
    text = write_metrics(Facts(view, view.totals, AdminSettings(), 1_000_000.0, expiry))
    found = {family.name: family for family in text_string_to_metric_families(text)}
    assert len(found) == len(METRICS)
    return found


def value(family: Family, **labels: str) -> float:
    (sample,) = [sample for sample in family.samples if sample.labels == labels]
    return sample.value


def test_every_family_is_read_with_its_type(board: Scoreboard) -> None:
    found = families(board)
    for metric in METRICS:
        family = found[f"leanserve_{metric.name}".removesuffix("_total")]
        assert family.type == metric.kind
        assert family.documentation == metric.help


def test_sums(board: Scoreboard) -> None:
    serve_some(board, 0)
    serve_some(board, 1)
    found = families(board, 2_000_000.5)
    assert value(found["leanserve_requests"]) == 4
    assert value(found["leanserve_in_flight"]) == value(found["leanserve_connections"]) == 2
    assert value(found["leanserve_websockets"]) == 2
    assert value(found["leanserve_sent_bytes"]) == 8000
    assert value(found["leanserve_responses"], status="2xx") == 2
    assert value(found["leanserve_responses"], status="5xx") == 2
    assert value(found["leanserve_early_ends"], cause="app_error") == 2
    assert (value(found["leanserve_limited"]), value(found["leanserve_refused"])) == (2, 4)
    assert value(found["leanserve_worker_restarts"]) == 3
    assert value(found["leanserve_worker_crashes"]) == 1
    assert value(found["leanserve_workers"], state="ready") == 2
    assert value(found["leanserve_workers"], state="draining") == 0
    assert value(found["leanserve_workers_wanted"]) == 2
    assert value(found["leanserve_ready"]) == 1
    assert value(found["leanserve_start_time_seconds"]) == 999_996
    assert value(found["leanserve_loop_lag_seconds"], worker="2", lane="0") == 0.25
    assert value(found["leanserve_loop_late_seconds"]) == 0.5
    assert value(found["leanserve_heartbeat_age_seconds"], worker="1", lane="0") == 1
    assert value(found["leanserve_fastpath_share"], of="heads") == 0.9
    assert len(found["leanserve_fastpath_share"].samples) == 1  # of frames there were none
    assert value(found["leanserve_certificate_expiry_timestamp_seconds"]) == 2_000_000.5


def test_histograms_are_cumulative(board: Scoreboard) -> None:
    serve_some(board, 0)
    found = families(board)
    wanted = (("request_duration", 2, 3.0015), ("first_byte", 2, 1.0015), ("chunk_gap", 1, 0.2))
    for name, count, total in wanted:
        samples = found[f"leanserve_{name}_seconds"].samples
        buckets = [(float(each.labels["le"]), each.value) for each in samples if "le" in each.labels]
        assert [limit for limit, _ in buckets] == [*LIMITS_S, float("inf")]
        numbers = [number for _, number in buckets]
        assert numbers == sorted(numbers)
        (whole,) = (each.value for each in samples if each.name.endswith("_count"))
        (sum_s,) = (each.value for each in samples if each.name.endswith("_sum"))
        assert (whole, numbers[-1], sum_s) == (count, count, pytest.approx(total))
    duration = found["leanserve_request_duration_seconds"].samples
    below = {float(each.labels["le"]): each.value for each in duration if "le" in each.labels}
    assert (below[2.0**-10], below[2.0**-9], below[2.0], below[4.0]) == (0, 1, 1, 2)


def test_counters_do_not_go_back_when_a_worker_dies_and_gauges_do(board: Scoreboard) -> None:
    serve_some(board, 0)
    before = families(board)
    board.bury(0, 0, 100)
    dead = families(board)
    assert value(dead["leanserve_in_flight"]) == value(dead["leanserve_connections"]) == 0
    serve_some(board, 0, generation=1)
    after = families(board)
    for name, family in before.items():
        if family.type in ("counter", "histogram"):
            for old, now in zip(family.samples, dead[name].samples, strict=True):
                assert (now.name, now.labels, now.value) == (old.name, old.labels, old.value)
    assert value(after["leanserve_requests"]) == 4
    assert value(after["leanserve_responses"], status="2xx") == 2


def test_the_page_names_every_metric() -> None:
    rows = table(read("howto/prometheus.md"), "metric", "kind", "what")
    listed = [(code(name), kind, what) for name, kind, what in rows]
    assert listed == [(f"leanserve_{metric.name}", metric.kind, metric.help) for metric in METRICS]
