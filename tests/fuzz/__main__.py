"""``python -m fuzz --heads 2000000 --seed 1``: exit status 1 when the two ways differ, and where."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from fuzz import Kind, fuzz
from fuzz.frames import Frames
from fuzz.http import Heads, Responses, Streams

KINDS: list[type[Kind[Any]]] = [Heads, Streams, Responses, Frames]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run each kind that was given a count. One line for each: cases, and what became of them."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    for kind in KINDS:
        parser.add_argument(f"--{kind.name}", type=int, default=0, metavar="N", help="how many cases")
    parser.add_argument("--seed", type=int, default=1, help="the cases are made from it")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case")
    parser.add_argument("--seconds", type=float, help="most seconds for each kind")
    given = vars(parser.parse_args(arguments))
    if not any(given[kind.name] for kind in KINDS):
        parser.error("of what kind? " + ", ".join(f"--{kind.name}" for kind in KINDS))
    print("kind          cases  recognised  declined  refused  seconds", flush=True)
    for make in KINDS:
        if not given[make.name]:
            continue
        kind, begun = make(), time.monotonic()
        done, finding = fuzz(
            kind, seed=given["seed"], count=given[make.name], first=given["first"], seconds=given["seconds"]
        )
        print(
            f"{kind.name:10}{done:9}{kind.recognised:12}{kind.declined:10}{kind.refused:9}"
            f"{time.monotonic() - begun:9.0f}",
            flush=True,
        )
        if finding is not None:
            print(finding)
            return 1
    print("no difference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
