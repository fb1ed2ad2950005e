"""The same facts for Prometheus, in its text format 0.0.4. The names are in docs/howto/prometheus.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from leanserve.admin.status import share
from leanserve.admin.view import View, judge_ready
from leanserve.scoreboard import Record, WorkerState
from leanserve.settings import AdminSettings
from leanserve.tally import CAUSES, LIMITS_S, STATUSES, Histogram, Totals

__all__ = ["CONTENT_TYPE", "METRICS", "Facts", "Metric", "Sample", "write_metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Facts(NamedTuple):
    """What metrics are made from.

    Attributes:
        unix_time_s: now, in seconds since 1970.
        certificate_expiry_s: the first of those that workers show, in seconds since 1970; or None.
        queues: of listeners, as :mod:`leanserve.supervisor.queues` says.
    """

    view: View
    totals: Totals
    settings: AdminSettings
    unix_time_s: float
    certificate_expiry_s: float | None
    queues: Sequence[dict[str, Any]] = ()


class Sample(NamedTuple):
    """One line: labels, and the value. `suffix` is what a histogram puts behind its name."""

    value: float
    labels: tuple[tuple[str, str], ...] = ()
    suffix: str = ""


class Metric(NamedTuple):
    """One family.

    Attributes:
        name: without the prefix; a counter ends in ``_total``.
        kind: "counter", "gauge" or "histogram".
        help: one sentence.
        read: its samples.
    """

    name: str
    kind: str
    help: str
    read: Callable[[Facts], Iterable[Sample]]


def _sum(name: str) -> Callable[[Facts], Iterable[Sample]]:
    """Over all workers that there have been: a counter."""
    return lambda facts: [Sample(sum(getattr(record, name) for record in facts.view.records))]


def _now(name: str) -> Callable[[Facts], Iterable[Sample]]:
    """Over the workers that there are: a gauge."""
    return lambda facts: [Sample(sum(getattr(record, name) for record in facts.view.living))]


def _server(name: str) -> Callable[[Facts], Iterable[Sample]]:
    return lambda facts: [Sample(getattr(facts.view.server, name))]


def _by(label: str, names: Sequence[str], field: str) -> Callable[[Facts], Iterable[Sample]]:
    def read(facts: Facts) -> Iterable[Sample]:
        values = getattr(facts.totals, field)
        return [Sample(value, ((label, name),)) for name, value in zip(names, values, strict=True)]

    return read


def _per_worker(value: Callable[[View, Record], float]) -> Callable[[Facts], Iterable[Sample]]:
    """A sample per worker; in one slot there may be two while one replaces the other, in different lanes."""

    def read(facts: Facts) -> Iterable[Sample]:
        for record in facts.view.living:
            labels = (("worker", str(record.slot + 1)), ("lane", str(record.lane)))
            yield Sample(value(facts.view, record), labels)

    return read


def _states(facts: Facts) -> Iterable[Sample]:
    states = (WorkerState.BOOTING, WorkerState.READY, WorkerState.DRAINING)
    for state in states:
        number = sum(record.state is state for record in facts.view.living)
        yield Sample(number, (("state", state.name.lower()),))


def _histogram(field: str) -> Callable[[Facts], Iterable[Sample]]:
    def read(facts: Facts) -> Iterator[Sample]:
        histogram: Histogram = getattr(facts.totals, field)
        limits = [*map(repr, LIMITS_S), "+Inf"]
        for limit, number in zip(limits, accumulate(histogram.buckets), strict=True):
            yield Sample(number, (("le", limit),), "_bucket")
        yield Sample(histogram.sum_ns / 1e9, (), "_sum")
        yield Sample(histogram.total, (), "_count")

    return read


def _fastpath(facts: Facts) -> Iterator[Sample]:
    living = facts.view.living
    pairs = {
        "heads": share([(each.heads_recognised, each.heads_declined) for each in living]),
        "frames": share([(each.frames_recognised, each.frames_declined) for each in living]),
    }
    for name, value in pairs.items():
        if value is not None:
            yield Sample(value, (("of", name),))


def _expiry(facts: Facts) -> Iterator[Sample]:
    if facts.certificate_expiry_s is not None:
        yield Sample(facts.certificate_expiry_s)


def _queues(facts: Facts) -> Iterator[Sample]:
    for each in facts.queues:
        labels = (("listener", each["listener"]), ("worker", str(each["worker"] or "all")))
        yield Sample(each["queued"], labels)


METRICS = (
    Metric("start_time_seconds", "gauge", "When the server began, in seconds since 1970.",
           lambda facts: [Sample(facts.unix_time_s - facts.view.age_s(facts.view.server.born_ns))]),
    Metric("ready", "gauge", "1 when /readyz says yes.",
           lambda facts: [Sample(judge_ready(facts.view, facts.settings).good)]),
    Metric("workers", "gauge", "Worker processes, by state.", _states),
    Metric("workers_wanted", "gauge", "How many workers there should be.", _server("slots")),
    Metric("worker_crashes_total", "counter", "Workers that ended without being told to.",
           _server("crashes")),
    Metric("worker_restarts_total", "counter", "Workers started in the place of others.",
           _server("restarts")),
    Metric("requests_total", "counter", "Requests and WebSockets whose application call has ended.",
           _sum("requests")),
    Metric("in_flight", "gauge", "Requests and WebSockets at work.", _now("in_flight")),
    Metric("responses_total", "counter", "Responses by the first digit of the status; none: the client left.",
           _by("status", STATUSES, "statuses")),
    Metric("early_ends_total", "counter", "Requests that ended early, by cause.",
           _by("cause", CAUSES, "causes")),
    Metric("limited_total", "counter", "Requests answered 503 for a limit.",
           lambda facts: [Sample(facts.totals.limited)]),
    Metric("refused_total", "counter", "Requests and frames that broke the protocol.",
           lambda facts: [Sample(facts.totals.refused)]),
    Metric("request_duration_seconds", "histogram", "From the request's head to the end of the response.",
           _histogram("duration")),
    Metric("first_byte_seconds", "histogram", "From the request's head to the first byte of the response.",
           _histogram("first_byte")),
    Metric("chunk_gap_seconds", "histogram", "From one piece of a streamed response to the next.",
           _histogram("gap")),
    Metric("queued", "gauge", "Requests and WebSockets that wait for a slot.", _now("places_held")),
    Metric("accept_queue", "gauge", "Connections that wait in the kernel to be accepted, by listener.",
           _queues),
    Metric("connections", "gauge", "Open connections.", _now("connections")),
    Metric("accepted_connections_total", "counter", "Accepted connections.", _sum("connections_total")),
    Metric("websockets", "gauge", "Open WebSockets.", _now("websockets")),
    Metric("accepted_websockets_total", "counter", "Accepted WebSockets.", _sum("websockets_total")),
    Metric("received_bytes_total", "counter", "Bytes of request bodies and messages.", _sum("bytes_in")),
    Metric("sent_bytes_total", "counter", "Bytes of response bodies and messages.", _sum("bytes_out")),
    Metric("loop_lag_seconds", "gauge", "How late the last tick of a worker's event loop came.",
           _per_worker(lambda _view, record: record.loop_lag_ns / 1e9)),
    Metric("loop_late_seconds_total", "counter", "How late all these ticks came together.",
           lambda facts: [Sample(sum(record.loop_lag_total_ns for record in facts.view.records) / 1e9)]),
    Metric("heartbeat_age_seconds", "gauge", "Since the last tick of a worker's event loop.",
           _per_worker(lambda view, record: view.age_s(record.heartbeat_ns or view.now_ns))),
    Metric("app_ready", "gauge", "0 while the application of a worker wants no requests.",
           _per_worker(lambda _view, record: not record.app_not_ready)),
    Metric("fastpath_share", "gauge", "Part of the heads and frames that the fast path took.", _fastpath),
    Metric("certificate_expiry_timestamp_seconds", "gauge", "Until when the certificate in use is valid.",
           _expiry),
)  # fmt: skip


def write_metrics(facts: Facts) -> str:
    """All of them as text."""
    return "".join(_write(metric, facts) for metric in METRICS)


def _write(metric: Metric, facts: Facts) -> str:
    name = f"leanserve_{metric.name}"
    lines = [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}"]
    for sample in metric.read(facts):
        labels = ",".join(f'{label}="{value}"' for label, value in sample.labels)  # ours: nothing to escape
        shown = f"{{{labels}}}" if labels else ""
        lines.append(f"{name}{sample.suffix}{shown} {_number(sample.value)}")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return repr(float(value)) if isinstance(value, float) and not value.is_integer() else str(int(value))
