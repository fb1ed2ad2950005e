"""Measure what the supervisor promises, beside its peers: python -m benchmarks.operations [--only PARTS].

Prints what it finds. With --out it writes operations.json there, in which the parts that were run replace
those of before, and the pages made from it. Linux only.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.facts import facts
from benchmarks.operations import chaos, longtail, soak, spread
from benchmarks.operations.client import raise_descriptors
from benchmarks.operations.report import section
from benchmarks.operations.results import Found, Scale
from benchmarks.operations.servers import SERVERS, absent
from benchmarks.operations.write import write
from benchmarks.peers import REFERENCE

PARTS = {part.PART: part for part in (spread, longtail, chaos, soak)}
_UNLESS_ASKED = (spread.PART, longtail.PART, chaos.PART)
_ALONE = (soak.PART,)  # it is long: peers when they are asked for
SMOKE = Scale(
    seconds=2.0, peer_seconds=2.0, connections=200, tail_seconds=0.3, rounds=1, trials=1, sample_s=0.3
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.operations", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--only", default=",".join(_UNLESS_ASKED), metavar="PARTS",
        help=f"of: {','.join(PARTS)} (%(default)s)",
    )
    add("--cases", metavar="CASES", help=f"of chaos, these only: {','.join(chaos.CASES)}")
    add("--peers", metavar="SERVERS", help=f"of: {','.join(SERVERS)}; default: all that a part has")
    add(
        "--seconds", type=float, default=Scale().seconds,
        help="of a case of chaos, and of the soak (%(default)s)",
    )
    add("--peer-seconds", type=float, help="of a case of chaos with a peer; default: a twelfth of --seconds")
    add("--rounds", type=int, default=Scale().rounds, help="of the long tail (%(default)s)")
    add("--connections", type=int, default=Scale().connections, help="of the spread (%(default)s)")
    add("--out", type=Path, metavar="FOLDER", help="for operations.json and its pages")
    add("--smoke", action="store_true", help="everything once and tiny: does it all still run?")
    return parser


def _names(text: str, known: dict[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return [name for name in known if name in names]


def _scale(options: argparse.Namespace) -> Scale:
    if options.smoke:
        return SMOKE
    peer_seconds = options.peer_seconds or options.seconds / 12
    return replace(
        Scale(), seconds=options.seconds, peer_seconds=peer_seconds, rounds=options.rounds,
        connections=options.connections, sample_s=min(Scale().sample_s, options.seconds / 12),
    )


def _default(part: str) -> list[str]:
    return [REFERENCE] if part in _ALONE else list(SERVERS)


def _tell(found: list[Found], one: Found) -> None:
    found.append(one)
    told = one.reason or ", ".join(f"{name} {value:.4g}" for name, value in one.figures.items())
    print(f"{one.part}, {one.case}, {one.server}: {told}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; exit code 0, or 1 when something could not be measured."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error("needs Linux")
    scale = _scale(options)
    asked = _names(options.peers, SERVERS, parser) if options.peers else []
    cases = _names(options.cases, chaos.CASES, parser) if options.cases else list(chaos.CASES)
    raise_descriptors()
    held: dict[str, Any] = {}
    for part in _names(options.only, PARTS, parser):
        wanted = [name for name in PARTS[part].SERVERS if name in (asked or _default(part))]
        without = absent(wanted)
        servers = [name for name in wanted if name not in without]
        known = facts(
            " ".join(["python -m benchmarks.operations", *arguments]),
            {SERVERS[name].peer for name in servers}, absent=without,
        )
        found: list[Found] = []
        more = {"cases": cases} if part == chaos.PART else {}
        uvloop.run(PARTS[part].run(servers, scale, lambda one, found=found: _tell(found, one), **more))
        held[part] = {"facts": known, "found": [one.as_json() for one in found]}
        print("\n".join(section({part: held[part]})), flush=True)
        if options.out:  # after each part: a run that is broken off keeps what it has
            write(options.out, held)
    return 1 if any("reason" in one for part in held.values() for one in part["found"]) else 0


if __name__ == "__main__":
    sys.exit(main())
