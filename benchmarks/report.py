"""Medians and ratios of what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from benchmarks.peers import REFERENCE


@dataclass(frozen=True, slots=True)
class Sample:
    """One server in one round.

    Attributes:
        cpu_us: CPU time of the server's processes per request, in microseconds.
        per_s: requests per second.
    """

    name: str
    cpu_us: float
    per_s: float


@dataclass(frozen=True, slots=True)
class Row:
    """One server over all rounds: medians, and ratios to leanserve (above 1: it costs, or does, more)."""

    name: str
    cpu_us: float
    per_s: float
    cpu_ratio: float | None
    per_s_ratio: float | None


def rows(samples: list[Sample]) -> list[Row]:
    """A row per server, in order of appearance."""
    names = list(dict.fromkeys(sample.name for sample in samples))
    cpu = {name: median(one.cpu_us for one in samples if one.name == name) for name in names}
    per_s = {name: median(one.per_s for one in samples if one.name == name) for name in names}
    return [
        Row(
            name, round(cpu[name], 1), round(per_s[name]),
            round(cpu[name] / cpu[REFERENCE], 2) if REFERENCE in cpu else None,
            round(per_s[name] / per_s[REFERENCE], 2) if REFERENCE in per_s else None,
        )
        for name in names
    ]


def table(found: list[Row]) -> str:
    """The rows as text."""
    lines = [f"{'server':20}{'CPU us/request':>16}{'x leanserve':>13}{'requests/s':>13}{'x leanserve':>13}"]
    for row in found:
        cpu, per_s = (f"{one:.2f}" if one else "-" for one in (row.cpu_ratio, row.per_s_ratio))
        lines.append(f"{row.name:20}{row.cpu_us:16.1f}{cpu:>13}{row.per_s:13.0f}{per_s:>13}")
    by_name = {row.name: row for row in found}
    if REFERENCE in by_name and "uvicorn-h11" in by_name:
        ratio = by_name[REFERENCE].cpu_us / by_name["uvicorn-h11"].cpu_us
        lines.append(f"CPU per request, leanserve / uvicorn-h11: {ratio:.2f}")
    return "\n".join(lines)
