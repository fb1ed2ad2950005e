"""One look at the scoreboard, and what it says: does the server live, is it ready, has it started?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from leanserve.scoreboard import Record, Scoreboard, ServerRecord, WorkerState
from leanserve.settings import AdminSettings
from leanserve.tally import Totals

__all__ = ["Verdict", "View", "judge_live", "judge_ready", "judge_started", "look"]


_TELLS_WITHIN_NS = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """Yes or no, and why: lines of text."""

    good: bool
    text: str


@dataclass(frozen=True, slots=True)
class View:
    """All records at one moment.

    Attributes:
        now_ns: of the monotonic clock.
        records: of all workers that there have been, the last of each lane; their counters count.
    """

    now_ns: int
    server: ServerRecord
    records: tuple[Record, ...]

    @property
    def living(self) -> list[Record]:
        """Those whose worker is still there; their gauges count."""
        return [record for record in self.records if record.state is not WorkerState.STOPPED]

    @property
    def counted_ns(self) -> int:
        """When the counters were told: workers do that with the tick of their loop. Growth per second is over
        the time between two such moments; where no loop moves any more it is over our own."""
        told_ns = max((record.heartbeat_ns for record in self.living), default=0)
        return told_ns if self.now_ns - told_ns < _TELLS_WITHIN_NS else self.now_ns

    @property
    def totals(self) -> Totals:
        """What all workers have counted of their requests."""
        return reduce(Totals.plus, (record.totals for record in self.records), Totals.of([0] * 256))

    def age_s(self, then_ns: int) -> float:
        """Seconds since then; a clock of another process may be read a moment later than ours."""
        return max(self.now_ns - then_ns, 0) / 1e9

    def is_stalled(self, record: Record, max_stall: float | None) -> bool:
        """Whether the loop of a worker that has started stands still for too long."""
        beats = record.state in (WorkerState.READY, WorkerState.DRAINING)
        return max_stall is not None and beats and self.age_s(record.heartbeat_ns) > max_stall


def look(board: Scoreboard, now_ns: int) -> View:
    """Read all records."""
    return View(now_ns, board.read_server(), tuple(board.records()))


def judge_live(view: View, settings: AdminSettings) -> Verdict:
    """The supervisor is up, and not every worker's loop stands still."""
    beating = [each for each in view.living if each.state in (WorkerState.READY, WorkerState.DRAINING)]
    stalled = [each for each in beating if view.is_stalled(each, settings.max_stall)]
    if beating and len(stalled) == len(beating):
        limit = settings.max_stall
        return _verdict(False, f"not live: no loop has moved for {limit:g} s (max_stall)", view, settings)
    return _verdict(True, f"live: the supervisor (pid {view.server.pid}) is up", view, settings)


def judge_ready(view: View, settings: AdminSettings) -> Verdict:
    """Enough workers take requests, and the server is not about to stop."""
    number = sum(_why_not(view, each, settings) == "" for each in view.living)
    facts = f"{number} of {view.server.slots} workers ready, {settings.ready_workers} wanted"
    if view.server.stopping:
        return _verdict(False, f"not ready: the server is stopping ({facts})", view, settings)
    good = number >= settings.ready_workers
    return _verdict(good, f"{'ready' if good else 'not ready'}: {facts}", view, settings)


def judge_started(view: View, settings: AdminSettings) -> Verdict:
    """A first worker has been ready."""
    good = view.server.ready_ns != 0
    word = "started" if good else "not started: no worker has been ready yet"
    return _verdict(good, word, view, settings)


def _why_not(view: View, record: Record, settings: AdminSettings) -> str:
    """Why a worker gets no requests; "" when it gets some."""
    if record.state is not WorkerState.READY:
        return record.state.name.lower()
    if record.app_not_ready:
        return "the application says that it is not ready"
    return "its loop stands still" if view.is_stalled(record, settings.max_stall) else ""


def _verdict(good: bool, first: str, view: View, settings: AdminSettings) -> Verdict:
    lines = [first]
    for record in view.living:
        why = _why_not(view, record, settings) or "ready"
        beat = f", last heartbeat {view.age_s(record.heartbeat_ns):.1f} s ago" if record.heartbeat_ns else ""
        lines.append(f"worker {record.slot + 1} (pid {record.pid}): {why}{beat}")
    return Verdict(good, "\n".join(lines) + "\n")
