"""Medians, ratios and verdicts of what was measured, and the page that shows them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers import REFERENCE
from benchmarks.workloads import WORKLOADS, Figure, Must, Workload

_SIGNS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge}


@dataclass(frozen=True, slots=True)
class Sample:
    """One server in one round of one workload.

    Attributes:
        figures: name of the figure (see Workload.figures) to value, in seconds, bytes or units per second.
    """

    workload: str
    peer: str
    round: int
    figures: dict[str, float]


@dataclass(frozen=True, slots=True)
class Missing:
    """A measurement that could not be made, and why."""

    workload: str
    peer: str
    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and most of some rounds."""

    median: float
    least: float
    most: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether something holds that must.

    Attributes:
        ratio: of the rounds that measured both; None when there was none.
        holds: the median against the limit, as the must says; None without a ratio.
    """

    workload: str
    must: Must
    ratio: Spread | None
    holds: bool | None


def spread(values: Iterable[float]) -> Spread | None:
    """None when there are no values."""
    found = list(values)
    return Spread(median(found), min(found), max(found), len(found)) if found else None


def figures(samples: list[Sample], workload: str, figure: str, peer: str) -> dict[int, float]:
    """Round to value."""
    return {
        one.round: one.figures[figure]
        for one in samples
        if one.workload == workload and one.peer == peer and figure in one.figures
    }


def ratio(samples: list[Sample], workload: str, figure: str, subject: str, peer: str) -> Spread | None:
    """subject / peer, of the rounds that measured both: within a round the machine was the same."""
    above = figures(samples, workload, figure, subject)
    below = figures(samples, workload, figure, peer)
    return spread(above[number] / below[number] for number in above if below.get(number))


def verdict(samples: list[Sample], workload: str, must: Must) -> Verdict:
    """Measured, not assumed: what was not measured does not hold."""
    found = ratio(samples, workload, must.figure, must.subject, must.peer)
    holds = None if found is None else bool(_SIGNS[must.sign](found.median, must.limit))
    return Verdict(workload, must, found, holds)


def verdicts(samples: list[Sample], workloads: Iterable[str]) -> list[Verdict]:
    """All musts of these workloads, in the order of the table."""
    return [verdict(samples, name, must) for name in workloads for must in WORKLOADS[name].musts]


def table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    """Lines of Markdown."""
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _shown(found: Spread | None, figure: Figure) -> str:
    if found is None:
        return "-"
    low, middle, high = (
        f"{value / figure.scale:,.{figure.digits}f}" for value in (found.least, found.median, found.most)
    )
    return middle if low == high else f"{middle} ({low}..{high})"


def show_ratio(found: Spread | None) -> str:
    """Median, least and most for a cell."""
    return "-" if found is None else f"{found.median:.2f} ({found.least:.2f}..{found.most:.2f})"


_HOLDS = {True: "yes", False: "**no**", None: "not measured"}


def verdict_table(found: list[Verdict]) -> Iterator[str]:
    """A row for everything that must hold."""
    rows = []
    for one in found:
        must = one.must
        measured = f"{one.ratio.median:.2f}" if one.ratio else "-"
        around = f"{one.ratio.least:.2f}..{one.ratio.most:.2f}" if one.ratio else "-"
        title = WORKLOADS[one.workload].figures[must.figure].title
        sides = must.peer if must.subject == REFERENCE else f"{must.peer}, of {must.subject}"
        rows.append([
            one.workload, title, sides, f"{must.sign} {must.limit:.2f}", measured, around, _HOLDS[one.holds],
        ])
    return table(["row", "figure", "against", "must", "median", "min..max", "holds"], rows)


def workload_tables(samples: list[Sample], names: Iterable[str]) -> Iterator[str]:
    """Every workload with all its figures."""
    for name in names:
        workload: Workload = WORKLOADS[name]
        measured = {one.peer for one in samples if one.workload == name}
        if not measured:
            continue
        yield from ("", f"### {name}: {workload.title}", "")
        if workload.notes:
            yield from (workload.notes, "")
        head, rows = ["server"], []
        for figure in workload.figures.values():
            unit = f", {figure.unit}" if figure.unit else ""
            head += [f"{figure.title}{unit}", f"{REFERENCE} / it"]
        for peer in (one for one in workload.peers if one in measured):
            row = [peer]
            for key, figure in workload.figures.items():
                row.append(_shown(spread(figures(samples, name, key, peer).values()), figure))
                beside = ratio(samples, name, key, REFERENCE, peer)
                row.append("1" if peer == REFERENCE else show_ratio(beside))
            rows.append(row)
        yield from table(head, rows)


def two_workers(samples: list[Sample]) -> Iterator[str]:
    """Requests per second with two workers, as a multiple of those with one."""
    rows = []
    for peer in WORKLOADS["workers-2"].peers:
        one = figures(samples, "workers-1", "rate", peer)
        two = figures(samples, "workers-2", "rate", peer)
        more = spread(two[number] / one[number] for number in two if one.get(number))
        rows.append([peer, show_ratio(more)])
    yield from ("", "### Two workers against one, requests per second", "")
    yield from table(["server", "two / one"], rows)


def left_out(facts: dict[str, Any], missing: list[Missing]) -> Iterator[str]:
    """Who is not in every row, and why."""
    for peer in dict.fromkeys(name for row in facts["workloads"] for name in WORKLOADS[row].peers):
        rows = [name for name in facts["workloads"] if peer in WORKLOADS[name].peers]
        if len(rows) < len(facts["workloads"]):
            yield f"- {peer} is measured where a comparison with it is asked for: {', '.join(rows)}"
    for name, packages in facts["absent"].items():
        yield f"- {name}: {', '.join(packages)} not installed"
    for one in missing:
        yield f"- {one.workload}, {one.peer}, round {one.round}: {one.reason}"


def _facts(facts: dict[str, Any]) -> Iterator[str]:
    named = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    commit = f", commit {facts['commit']}" if facts["commit"] else ""
    yield f"`{facts['command']}`, {facts['date']}{commit}."
    yield ""
    yield f"- {facts['cpu']}, {facts['cpus']} CPUs, {facts['kernel']}, {facts['python']}"
    yield f"- {named}"
    yield (
        f"- {facts['rounds']} rounds of {facts['seconds']} s each; {facts['idle']:,} idle connections; "
        f"load of the machine before the run {facts['load_before']}"
    )


_HOW = """\
Every server serves the same application to the same client over loopback, access log off, uvloop in all of
them, one worker where nothing else is said. The server has one CPU and the client the other. Rounds alternate
(A B C, then C B A). The CPU time is that of the server's processes, all of them, user and system, from the
kernel's clock of each process. A ratio is leanserve's figure divided by the peer's figure of the same round;
what is shown is the median of the rounds, with the least and the most. Only ratios carry over to another
machine. Where the client takes longer than the server, the rate is the client's, and CPU per unit is what to
read. leanserve-no-numpy is leanserve where numpy is not installed; uvicorn-sansio is uvicorn with httptools
and `--ws websockets-sansio`.
"""


def page(
    facts: dict[str, Any], samples: list[Sample], missing: list[Missing], notes: Path, plots: Iterable[str],
    operations: Iterable[str] = (),
) -> str:
    """RESULTS.md.

    Args:
        notes: folder whose *.md, kept by hand, are put at the end.
        operations: lines before them, see benchmarks.operations.report.
    """
    names = list(facts["workloads"])
    found = verdicts(samples, names)
    holding = sum(one.holds is True for one in found)
    unknown = sum(one.holds is None for one in found)
    lines = ["# Results", "", "Made by `python -m benchmarks`; do not edit: notes by hand are in `notes/`."]
    lines.append("")
    lines += [*_facts(facts), "", _HOW]
    lines += ["## What must hold", ""]
    lines += [f"{holding} of {len(found)} hold" + (f", {unknown} were not measured." if unknown else "."), ""]
    lines += [*verdict_table(found), ""]
    lines += [f"![{name}](plots/{name}.svg)" for name in plots]
    lines += ["", "## All figures", "", "Median (least..most)."]
    lines += workload_tables(samples, names)
    if {"workers-1", "workers-2"} <= set(names):
        lines += two_workers(samples)
    lines += ["", "## Left out", "", *(list(left_out(facts, missing)) or ["Nothing."])]
    if operations := list(operations):
        lines += ["", *operations]
    for note in sorted(notes.glob("*.md")):
        lines += ["", note.read_text().strip()]
    return "\n".join(lines) + "\n"
