"""Measure leanserve and its peers in turn: python -m benchmarks [--rounds 4] [--seconds 3] [--json FILE].

Rounds alternate (A B C, then C B A), so that a machine that gets slower or faster favours nobody. Where there
are two CPUs the server has one and the client another.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.cpu import cpu_seconds
from benchmarks.peers import COMMANDS, ROOT, serving
from benchmarks.report import Sample, rows, table

_WARM_UP_S = 0.5


def _pin(cpus: set[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)


def _cpus() -> tuple[set[int], set[int], set[int]]:
    """(all that we may use, the server's, the client's)"""
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
    first, *others = sorted(mine)
    return mine, {first}, set(others) or {first}


def _load(port: int, connections: int, seconds: float) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.client", str(port), str(connections), str(seconds)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, timeout=seconds + 60, check=True)
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def measure(name: str, connections: int, seconds: float) -> Sample:
    """One server, started, warmed up, loaded and stopped."""
    every, server_cpus, client_cpus = _cpus()
    try:
        _pin(server_cpus)  # what is started now inherits it
        with serving(name) as (pid, port):
            _pin(client_cpus)
            _load(port, connections, _WARM_UP_S)
            before = cpu_seconds(pid)
            done = _load(port, connections, seconds)
            used = cpu_seconds(pid) - before
    finally:
        _pin(every)
    # Each connection asks once more before the clock runs, to learn the length of an answer.
    answered = done["requests"] + connections
    return Sample(name, used / answered * 1e6, done["requests"] / done["seconds"])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; exit code 0, or 1 when a server could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="how often each server is measured (4)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement (3)")
    parser.add_argument("--connections", type=int, default=32, help="kept-alive connections (32)")
    parser.add_argument("--peers", default=",".join(COMMANDS), help="comma-separated, of: %(default)s")
    parser.add_argument("--json", type=Path, help="write medians and samples here")
    options = parser.parse_args(arguments)
    names = options.peers.split(",")
    if unknown := set(names) - set(COMMANDS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    samples: list[Sample] = []
    failed: set[str] = set()
    for number in range(options.rounds):
        for name in names if number % 2 == 0 else reversed(names):
            if name in failed:
                continue
            try:
                samples.append(measure(name, options.connections, options.seconds))
            except (RuntimeError, subprocess.SubprocessError) as error:
                failed.add(name)
                print(f"{name}: {error}", file=sys.stderr)
    found = rows(samples)
    print(table(found))
    if options.json:
        facts = {"rows": found, "samples": samples}
        readable = {key: [dataclasses.asdict(one) for one in value] for key, value in facts.items()}
        options.json.write_text(json.dumps(readable, indent=2) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
