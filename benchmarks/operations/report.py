"""The section on operations of RESULTS.md, made from operations.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.operations import chaos, longtail, soak, spread
from benchmarks.operations.results import Found
from benchmarks.operations.servers import SHARED
from benchmarks.peers import REFERENCE
from benchmarks.report import Spread, show_ratio, table
from benchmarks.report import spread as spread_of

Verdict = tuple[str, str, str, bool]  # what, must, measured, holds
_MOST_SPREAD = 1.3
_MOST_TAIL = 1.1  # as good as the peer, but for noise
_MIB = 1 << 20
_TAIL_PEERS = tuple(name for name in longtail.SERVERS if not name.startswith(REFERENCE))


def read(part: dict[str, Any]) -> list[Found]:
    """The findings of a part of operations.json."""
    return [Found(**one) for one in part["found"]]


def _of(found: list[Found], case: str) -> list[Found]:
    return [one for one in found if one.case == case and not one.reason]


def _servers(found: list[Found]) -> list[str]:
    return list(dict.fromkeys(one.server for one in found))


def _reasons(found: list[Found]) -> Iterator[str]:
    missing = [one for one in found if one.reason]
    if missing:
        yield ""
    for one in missing:
        yield f"- not measured: {one.case}, {one.server}: {one.reason}"


# Spread

_SPREAD = """\
{connections:,} connections with a GET each, from {ports} source ports of many addresses, to four workers.
Connections of the busiest worker divided by those of the idlest.
"""


def _spread(found: list[Found]) -> Iterator[str]:
    answered = max((int(one.figures["answered"]) for one in found if not one.reason), default=0)
    yield from ("### Spread", "", _SPREAD.format(connections=answered, ports=spread.SOURCE_PORTS))
    head = ["server", *(case.title for case in spread.CASES.values()), "without an answer"]
    rows = []
    for name in _servers(found):
        mine = {one.case: one.figures for one in found if one.server == name and not one.reason}
        cells = [
            f"{mine[case]['ratio']:.2f} ({mine[case]['busiest']:.0f} / {mine[case]['idlest']:.0f})"
            if case in mine else "-" for case in spread.CASES
        ]
        rows.append([name, *cells, f"{sum(one['failed'] for one in mine.values()):.0f}"])
    yield from table(head, rows)
    yield from _reasons(found)


def _spread_verdicts(found: list[Found]) -> Iterator[Verdict]:
    for case, told in spread.CASES.items():
        for one in _of(found, case):
            if one.server == REFERENCE:
                ratio, failed = one.figures["ratio"], one.figures["failed"]
                what = f"spread: {told.title}, busiest / idlest"
                yield what, f"<= {_MOST_SPREAD}", f"{ratio:.2f}", ratio <= _MOST_SPREAD and not failed


# The long tail

_TAIL = """\
Four workers, open-loop arrivals (the same for all servers of a round), one request in ten takes 50 ms:
`block` sleeps and holds its loop, as a call to an accelerator does, `burn` takes CPU time, `wait` leaves the
loop to others. The share is that of what four workers (`burn`: two cores, of which the client has its part)
could do. "pool" is a pool of kept connections, one of them by lot. Milliseconds from the time at which the
request was meant to be sent; median of {rounds} rounds (least..most). What is asked is asked of the rows with
a connection each: a kept one stays with its worker, and who stands behind whom there is luck.
"""
_TAIL_FIGURES = {"p50": "p50", "p90": "p90", "p99": "p99", "max": "max", "fast_p99": "p99 of instant ones"}


def _by_round(found: list[Found], case: str, server: str, figure: str) -> dict[int, float]:
    return {one.round: one.figures[figure] for one in _of(found, case) if one.server == server}


def _ms(values: Spread | None) -> str:
    if values is None:
        return "-"
    low, middle, high = (f"{1000 * one:.1f}" for one in (values.least, values.median, values.most))
    return middle if low == high else f"{middle} ({low}..{high})"


def _tail(found: list[Found]) -> Iterator[str]:
    rounds = max((one.round for one in found), default=0)
    yield from ("### Long tail", "", _TAIL.format(rounds=rounds))
    rows = []
    for case in longtail.ROWS:
        for name in _servers(_of(found, case)):
            cells = [_ms(spread_of(_by_round(found, case, name, one).values())) for one in _TAIL_FIGURES]
            failed = sum(_by_round(found, case, name, "failed").values())
            rows.append([case, name, *cells, f"{failed:.0f}"])
    yield from table(["row", "server", *_TAIL_FIGURES.values(), "failed"], rows)
    what = longtail.AtOnce()
    at_once = _of(found, longtail.AT_ONCE)
    if at_once:
        held = f"{what.requests} requests that hold their worker for {what.ms / 1000} s"
        yield from ("", f"{held}, all at once, {what.workers} workers:", "")
        even = f"split evenly ({what.requests // what.workers} each)"
        yield from table(
            ["server", even, "most of one worker", "wall time, s, median", "most"],
            ([one.server, *_at_once_cells(one.figures)] for one in at_once),
        )
    yield from _reasons(found)


def _at_once_cells(told: dict[str, float]) -> list[str]:
    return [
        f"{told['even']:.0f} of {told['trials']:.0f}", f"{told['most']:.0f}", f"{told['wall']:.2f}",
        f"{told['wall_most']:.2f}",
    ]


def _tail_verdicts(found: list[Found]) -> Iterator[Verdict]:
    """p99 against that of each peer in the same round, where the server chooses who waits behind whom. Asked
    of the setting that is documented for long requests; the table has the default beside it."""
    for case, row in longtail.ROWS.items():
        for peer in _TAIL_PEERS if row.slow != "wait" and not row.keep_alive else ():
            mine, theirs = (_by_round(found, case, name, "p99") for name in (SHARED, peer))
            ratio = spread_of(mine[number] / theirs[number] for number in mine if theirs.get(number))
            if ratio:
                what = f"long tail, --accept shared: {case}, p99 / that of {peer}"
                yield what, f"<= {_MOST_TAIL:.2f}", show_ratio(ratio), ratio.median <= _MOST_TAIL
    for one in _of(found, longtail.AT_ONCE):
        if one.server == SHARED:
            even, trials = one.figures["even"], one.figures["trials"]
            what = "long requests at once, --accept shared: split evenly"
            yield what, "all", f"{even:.0f} of {trials:.0f}", even == trials


# Chaos

_CHAOS = """\
Four workers, 32 clients, of which 12 open a connection per request, 12 keep theirs busy, 8 idle for up to
2.5 s in between; POSTs that take 5 ms. The application writes down what it begins, in memory that outlives
it, and the kernel says whose a connection was when its worker was killed: so each loss is attributed. A fault
is any loss but those in flight on a killed worker (begun there, accepted by it, or sent to it on a kept
connection) and, where the supervisor was killed, refused connections. "Silence" is the longest time in which
no new connection got an answer; "stalled" are answers after 0.9 s and more, as when a SYN was dropped and
sent again. leanserve had {seconds:g} s of each, the others {peer_seconds:g} s.
"""


def _chaos(found: list[Found]) -> Iterator[str]:
    seconds = {one.server == REFERENCE: one.figures["seconds"] for one in found if not one.reason}
    told = _CHAOS.format(seconds=seconds.get(True, 0), peer_seconds=seconds.get(False, 0))
    yield from ("### Chaos", "", told)
    names = [loss.value for loss in chaos.Loss]
    for key, case in chaos.CASES.items():
        held = _of(found, key)
        if not held:
            continue
        yield from (f"#### {key}: {case.title}", "")
        rows = []
        for one in held:
            told = one.figures
            lost = [f"{told[name]:.0f} {name}" for name in names if told.get(name)]
            undone = f" ({told['undone']:.0f} not seen done)" if told["undone"] else ""
            rows.append([
                one.server, f"{told['acts']:.0f}{undone}",
                f"{told['answered']:.0f}", f"{told['at fault']:.0f}",
                "; ".join(lost) or "nothing",
                *(f"{1000 * told[figure]:.0f}" for figure in ("p50", "p99", "max", "silence")),
                f"{told['stalled']:.0f}",
            ])
        yield from table(
            [
                "server", "acts", "answered", "faults", "lost in all", "p50, ms", "p99", "max", "silence",
                "stalled",
            ],
            rows,
        )
        twice = sum(one.figures["begun twice"] for one in held)
        if twice:
            yield from ("", f"{twice:.0f} requests were begun twice.")
        yield ""
    yield from _reasons(found)


def _chaos_verdicts(found: list[Found]) -> Iterator[Verdict]:
    for key, case in chaos.CASES.items():
        for one in _of(found, key):
            if one.server == REFERENCE:
                faults = one.figures["at fault"] + one.figures["undone"]
                yield f"chaos: {case.title}, faults", "0", f"{faults:.0f}", faults == 0


# The soak

_SOAK = """\
{seconds:.0f} s of {clients}. Medians of the first and the last third of {samples} samples, and the slope of
the last two thirds. Flat: the last is at most a twentieth above the first, besides a small allowance.
"""
_METRICS: dict[str, tuple[str, Callable[[float], str]]] = {
    "rss": ("RSS, MiB", lambda value: f"{value / _MIB:.1f}"),
    "pss": ("PSS, MiB", lambda value: f"{value / _MIB:.1f}"),
    "fds": ("descriptors", lambda value: f"{value:.0f}"),
    "threads": ("threads", lambda value: f"{value:.0f}"),
    "tasks": ("tasks", lambda value: f"{value:.0f}"),
    "objects": ("objects", lambda value: f"{value:.0f}"),
}


def _soak(found: list[Found]) -> Iterator[str]:
    yield from ("### Soak", "")
    for load in _of(found, soak.LOAD):
        yield from (f"#### {load.server}", "")
        told = load.figures
        clients = ", ".join(f"{told[f'done: {name}']:.0f} x {name}" for name in soak.CLIENTS)
        yield _SOAK.format(seconds=told["seconds"], clients=clients, samples=int(told["samples"]))
        rows = [
            [one.case, title, show(one.figures[f"{metric} first"]), show(one.figures[f"{metric} last"]),
             show(one.figures[f"{metric} most"]), f"{show(one.figures.get(f'{metric} slope', 0))} per hour",
             "yes" if soak.is_flat(metric, one.figures) else "**no**"]
            for one in found if one.server == load.server and one.case != soak.LOAD
            for metric, (title, show) in _METRICS.items() if f"{metric} first" in one.figures
        ]
        yield from table(["process", "what", "first third", "last third", "most", "slope", "flat"], rows)
        yield from ("", (
            f"{told['failed']:.0f} clients failed; {told['replaced']:.0f} workers were replaced. When all "
            f"clients had gone: {told['tasks after']:.0f} tasks (before the load "
            f"{told['tasks before']:.0f}) and {told['fds after']:.0f} descriptors (before "
            f"{told['fds before']:.0f}) in all workers."
        ))
    yield from _reasons(found)


def _soak_verdicts(found: list[Found]) -> Iterator[Verdict]:
    for metric, (title, _) in _METRICS.items():
        mine = [
            one for one in found
            if one.server == REFERENCE and one.case != soak.LOAD and f"{metric} first" in one.figures
        ]
        if mine:
            flat = sum(soak.is_flat(metric, one.figures) for one in mine)
            what = f"soak: {title.split(',')[0]} of each process"
            yield what, "flat", f"{flat} of {len(mine)}", flat == len(mine)
    for load in _of(found, soak.LOAD):
        failed = load.figures["failed"]
        yield "soak: clients that failed", "0", f"{failed:.0f}", failed == 0


_Show = Callable[[list[Found]], Iterator[str]]
_Judge = Callable[[list[Found]], Iterator[Verdict]]
_PARTS: dict[str, tuple[_Show, _Judge]] = {
    spread.PART: (_spread, _spread_verdicts), longtail.PART: (_tail, _tail_verdicts),
    chaos.PART: (_chaos, _chaos_verdicts), soak.PART: (_soak, _soak_verdicts),
}


def verdicts(held: dict[str, Any]) -> list[Verdict]:
    """What must hold of leanserve, for the parts that were measured."""
    return [one for part, (_, judge) in _PARTS.items() if part in held for one in judge(read(held[part]))]


def _facts(parts: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    for part, facts in parts:
        commit = f", commit {facts['commit']}" if facts["commit"] else ""
        date = f"{facts['date']}{commit}, load before {facts['load_before']}"
        yield f"- {part}: `{facts['command']}`, {date}"
    for machine in dict.fromkeys(
        f"{facts['cpu']}, {facts['cpus']} CPUs, {facts['kernel']}, {facts['python']}" for _, facts in parts
    ):
        yield f"- {machine}"
    named = {name: number for _, facts in parts for name, number in facts["versions"].items()}
    yield "- " + ", ".join(f"{name} {number}" for name, number in sorted(named.items()))


def section(held: dict[str, Any]) -> list[str]:
    """Lines of Markdown. `held`: part to its facts and findings, as in operations.json."""
    found = verdicts(held)
    lines = ["## Operations", "", "Made by `python -m benchmarks.operations`.", ""]
    lines += _facts([(part, held[part]["facts"]) for part in _PARTS if part in held])
    rows = [[what, must, measured, "yes" if holds else "**no**"] for what, must, measured, holds in found]
    lines += ["", f"{sum(one[3] for one in found)} of {len(found)} hold.", ""]
    lines += [*table(["what", "must", "measured", "holds"], rows), ""]
    for part, (show, _) in _PARTS.items():
        if part in held:
            lines += [*show(read(held[part])), ""]
            lines += [f"![{name}](plots/{name}.svg)" for name in held[part].get("plots", [])]
            lines += [""] if held[part].get("plots") else []
    return lines[:-1]
