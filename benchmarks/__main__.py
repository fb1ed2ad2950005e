"""Measure leanserve and its peers in turn: python -m benchmarks [--rounds 5] [--only ROWS] [--smoke].

A run of all rows writes RESULTS.md, results.json and plots/ beside this file; a run of some of them prints
what it found, and writes only with --out. Linux only: CPU time, memory and affinity are read there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.facts import facts
from benchmarks.measure import SMOKE, Failure, Place, Scale, idle_connections, measure, prepare
from benchmarks.operations.write import kept_section
from benchmarks.peers import PEERS, missing
from benchmarks.plots import plots
from benchmarks.report import Missing, Sample, page, two_workers, verdict_table, verdicts, workload_tables
from benchmarks.workloads import WORKLOADS

_HERE = Path(__file__).resolve().parent
_MOST_FAILURES = 2  # of one server at one workload; then it is left out of the rounds that are left
_SMOKE_AT_ONCE = 3

Run = tuple[list[Sample], list[Missing]]


def _turns(workloads: list[str], peers: list[str], rounds: int) -> Iterator[tuple[str, str, int]]:
    """(workload, peer, round): each round in the opposite order of the one before it."""
    for number in range(1, rounds + 1):
        for workload in workloads:
            names = [name for name in WORKLOADS[workload].peers if name in peers]
            for name in names if number % 2 else reversed(names):
                yield workload, name, number


def _one(turn: tuple[str, str, int], scale: Scale, place: Place) -> Sample | Missing:
    workload, peer, number = turn
    try:
        found: Sample | Missing = Sample(*turn, measure(peer, WORKLOADS[workload], scale, place))
    except Failure as failure:
        found = Missing(*turn, str(failure))
    told = found.reason if isinstance(found, Missing) else ", ".join(
        f"{value / WORKLOADS[workload].figures[key].scale:.1f} {WORKLOADS[workload].figures[key].unit or key}"
        for key, value in found.figures.items()
    )
    print(f"{number} {workload} {peer}: {told}", file=sys.stderr, flush=True)
    return found


def run(workloads: list[str], peers: list[str], rounds: int, scale: Scale, at_once: int = 1) -> Run:
    """Measure all; a server that fails does not stop the rest."""
    samples: list[Sample] = []
    failed: list[Missing] = []

    def turn(one: tuple[str, str, int]) -> None:
        if sum((old.workload, old.peer) == one[:2] for old in failed) < _MOST_FAILURES:
            found = _one(one, scale, place)
            (failed if isinstance(found, Missing) else samples).append(found)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(at_once) as threads:
        place = prepare(Path(folder), scale)
        for _ in threads.map(turn, _turns(workloads, peers, rounds)):
            pass  # asks for the results, so that an error of ours is raised here
    return samples, failed


def _read(file: Path) -> tuple[dict[str, Any], Run]:
    """A results.json of before."""
    held = json.loads(file.read_text())
    samples = [Sample(**one) for one in held["samples"]]
    return held["facts"], (samples, [Missing(**one) for one in held["missing"]])


def _json(known: dict[str, Any], found: Run) -> str:
    held = {
        "facts": known,
        "verdicts": [dataclasses.asdict(one) for one in verdicts(found[0], known["workloads"])],
        "samples": [dataclasses.asdict(one) for one in found[0]],
        "missing": [dataclasses.asdict(one) for one in found[1]],
    }
    return json.dumps(held, indent=1) + "\n"


def write(folder: Path, known: dict[str, Any], found: Run) -> None:
    """RESULTS.md, results.json and plots/*.svg."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    drawn = plots(found[0])
    for name, drawing in drawn.items():
        (folder / "plots" / f"{name}.svg").write_text(drawing)
    (folder / "results.json").write_text(_json(known, found))
    operations = kept_section(folder)
    (folder / "RESULTS.md").write_text(page(known, *found, _HERE / "notes", drawn, operations))


def rewrite(folder: Path) -> None:
    """The pages anew, from the results.json and the operations.json that lie there."""
    write(folder, *_read(folder / "results.json"))


def _names(text: str, known: dict[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return [name for name in known if name in names]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, epilog="rows: " + ", ".join(WORKLOADS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", default=",".join(WORKLOADS), metavar="ROWS", help="these rows, comma-separated")
    add("--peers", default=",".join(PEERS), help="comma-separated, of: %(default)s")
    add("--rounds", type=int, default=5, help="how often each is measured (%(default)s)")
    add("--seconds", type=float, default=Scale().seconds, help="of one measurement (%(default)s)")
    add("--out", type=Path, metavar="FOLDER", help="for RESULTS.md, results.json and plots/")
    add("--json", type=Path, metavar="FILE", help="also write the raw figures here")
    add("--from", dest="source", type=Path, metavar="FILE", help="measure nothing, report this results.json")
    add("--smoke", action="store_true", help="everything once and tiny: does it all still run?")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; exit code 0, or 1 when a server could not be measured."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error("needs Linux")
    workloads = _names(options.only, WORKLOADS, parser)
    wanted = _names(options.peers, PEERS, parser)
    absent = {name: packages for name in wanted if (packages := missing(name))}
    peers = [name for name in wanted if name not in absent]
    if options.source:
        known, found = _read(options.source)
    else:
        scale = SMOKE if options.smoke else Scale(seconds=options.seconds)
        rounds, at_once = (1, _SMOKE_AT_ONCE) if options.smoke else (options.rounds, 1)
        known = facts(
            " ".join(["python -m benchmarks", *arguments]), peers,
            workloads=workloads, absent=absent, rounds=rounds, seconds=scale.seconds,
        )
        found = run(workloads, peers, rounds, scale, at_once)
        known["idle"] = idle_connections(scale)
    print("\n".join([*verdict_table(verdicts(found[0], workloads)), *workload_tables(found[0], workloads)]))
    if {"workers-1", "workers-2"} <= set(workloads):
        print("\n".join(two_workers(found[0])))
    if options.json:
        options.json.write_text(_json(known, found))
    if options.out:
        write(options.out, known, found)
    elif options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), known, found)
    elif workloads == list(WORKLOADS) and wanted == list(PEERS):
        write(_HERE, known, found)
    return 1 if found[1] else 0


if __name__ == "__main__":
    sys.exit(main())
