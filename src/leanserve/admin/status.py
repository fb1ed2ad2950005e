"""The status of the server as one JSON object; its form is in docs/howto/probes.md."""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Sequence
from typing import Any

from leanserve.admin.view import Verdict, View, judge_live, judge_ready, judge_started
from leanserve.scoreboard import Record, WorkerState
from leanserve.settings import AdminSettings
from leanserve.tally import CAUSES, LIMITS_S, STATUSES, Histogram

__all__ = ["Rates", "build_status", "share"]

_SHORTEST_NS, _LONGEST_NS = 900_000_000, 60_000_000_000
_MOST_LOOKS = 100


class Rates:
    """Growth per second of counters, over the time since an earlier look."""

    def __init__(self) -> None:
        self._looks: deque[tuple[int, dict[str, int]]] = deque(maxlen=_MOST_LOOKS)

    def take(self, now_ns: int, counters: dict[str, int]) -> dict[str, float]:
        """Per second since the youngest look that is a second old, a minute at most; empty without one.

        Args:
            now_ns: when the counters were told.
            counters: how they stand.
        """
        while self._looks and now_ns - self._looks[0][0] > _LONGEST_NS:
            self._looks.popleft()
        old = next((each for each in reversed(self._looks) if now_ns - each[0] >= _SHORTEST_NS), None)
        if not self._looks or now_ns - self._looks[-1][0] >= _SHORTEST_NS:
            self._looks.append((now_ns, counters))
        if old is None:
            return {}
        seconds = (now_ns - old[0]) / 1e9
        rates = {f"{name}_per_s": (counters[name] - old[1][name]) / seconds for name in counters}
        return {"over_s": seconds, **rates}


def build_status(
    view: View, settings: AdminSettings, rates: Rates, queues: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """All of it; numbers are since the start of the server where nothing else is said."""
    records, living, totals = view.records, view.living, view.totals
    counters = {
        name: sum(getattr(record, name) for record in records)
        for name in ("requests", "connections_total", "websockets_total", "bytes_in", "bytes_out")
    }
    gauges = {
        name: sum(getattr(record, name) for record in living)
        for name in ("in_flight", "connections", "websockets")
    }
    return {
        "server": _server(view),
        "live": _judged(judge_live(view, settings)),
        "ready": _judged(judge_ready(view, settings)),
        "started": _judged(judge_started(view, settings)),
        "workers": [_worker(view, record, settings) for record in living],
        "accept_queues": list(queues),
        **gauges,
        **counters,
        "rates": rates.take(view.counted_ns, counters),
        "statuses": dict(zip(STATUSES, totals.statuses, strict=True)),
        "causes": dict(zip(CAUSES, totals.causes, strict=True)),
        "limited": totals.limited,
        "refused": totals.refused,
        "fastpath": {
            "heads": share([(each.heads_recognised, each.heads_declined) for each in living]),
            "frames": share([(each.frames_recognised, each.frames_declined) for each in living]),
        },
        "limits_s": LIMITS_S,
        "duration": _histogram(totals.duration),
        "first_byte": _histogram(totals.first_byte),
        "gap": _histogram(totals.gap),
    }


def share(pairs: list[tuple[int, int]]) -> float | None:
    """The part of all that is the first of its pair; None of nothing."""
    taken, left = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    return taken / (taken + left) if taken + left else None


def _server(view: View) -> dict[str, Any]:
    server = view.server
    words = {"stopping": server.stopping, "rolling": server.rolling, "running": server.ready_ns}
    return {
        "version": importlib.import_module("leanserve").__version__,
        "pid": server.pid,
        "state": next((word for word, is_so in words.items() if is_so), "booting"),
        "uptime_s": view.age_s(server.born_ns),
        "counted_s": max(view.counted_ns - server.born_ns, 0) / 1e9,
        "upgrading_to": server.partner or None,
        "workers": server.slots,
        "crashes": server.crashes,
        "restarts": server.restarts,
    }


def _judged(verdict: Verdict) -> dict[str, Any]:
    return {"good": verdict.good, "text": verdict.text.partition("\n")[0]}


def _worker(view: View, record: Record, settings: AdminSettings) -> dict[str, Any]:
    return {
        "worker": record.slot + 1,
        "pid": record.pid,
        "state": record.state.name.lower(),
        "app_ready": not record.app_not_ready,
        "stalled": view.is_stalled(record, settings.max_stall),
        "generation": record.generation,
        "heartbeat_age_s": view.age_s(record.heartbeat_ns) if record.heartbeat_ns else None,
        "ready_for_s": view.age_s(record.ready_ns) if record.state is WorkerState.READY else None,
        "loop_lag_s": record.loop_lag_ns / 1e9,
        "in_flight": record.in_flight,
        "connections": record.connections,
        "websockets": record.websockets,
        "requests": record.requests,
    }


def _histogram(histogram: Histogram) -> dict[str, Any]:
    """A quantile is the upper limit of its bucket; null in the last, which has none."""
    found: dict[str, Any] = {"buckets": histogram.buckets, "count": histogram.total}
    found["sum_s"] = histogram.sum_ns / 1e9
    for name, part in (("p50_s", 0.5), ("p90_s", 0.9), ("p99_s", 0.99)):
        value = histogram.quantile(part)
        found[name] = value if value != float("inf") else None
    return found
