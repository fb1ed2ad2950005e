"""``python -m hostile``, from the folder tests/: exit status 1 when there are faults."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from harness import Certificates
from hostile.attacks import ATTACKS
from hostile.measure import COMMAND, Row, attacked, measure

_HEAD = (
    "attack                      conns      s  p99 calm  ratio  busy ms  stall ms  rss MiB  ratio  fds  tasks"
    "  longest s  outcomes"
)


def line(row: Row) -> str:
    """One line of the table, and one for each fault."""
    outcomes = ", ".join(f"{count} {what}" for what, count in sorted(row.outcomes.items()))
    text = (
        f"{row.attack:26}{row.connections:7}{row.seconds:7.1f}{row.calm_p99_ms:10.2f}{row.p99_ratio:7.2f}"
        f"{row.busy_ms:9.1f}{row.stall_ms:10.1f}{row.rss_mib:9.1f}{row.rss_ratio:7.3f}{row.fds:5}{row.tasks:7}"
        f"{row.longest_s:11.1f}  {outcomes}"
    )
    return "\n".join([text, *(f"  FAULT: {fault}" for fault in row.faults)])


def rows(names: Iterable[str], command: str, quick: bool) -> Iterator[Row]:
    """Each attack of these, on one server for all that are plain and one for TLS."""
    wanted = [(name, ATTACKS[name]) for name in names]
    for tls in (False, True):
        group = [(name, attack) for name, attack in wanted if attack.tls is tls]
        if not group:
            continue
        with tempfile.TemporaryDirectory() as folder:
            certificates = Certificates.make(Path(folder)) if tls else None
            with attacked(command, Path(folder), certificates, quick) as (server, beside):
                for name, attack in group:
                    yield measure(server, beside, name, attack, quick)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the attacks, one line for each."""
    parser = argparse.ArgumentParser(prog="python -m hostile", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few connections, and short deadlines")
    parser.add_argument(
        "--attack", action="append", choices=ATTACKS, metavar="NAME", help="only this; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="the names of the attacks, and no more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a JSON object per attack")
    parser.add_argument(
        "--no-gc", action="store_true", help="without the cycle collector: what is left is left for good"
    )
    parser.add_argument(
        "--server", default=COMMAND, metavar="CMD",
        help="another server: a command with {port} that serves hostile.app:app; default: %(default)s",
    )
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(ATTACKS))
        return 0
    if given.no_gc:
        os.environ["HOSTILE_GC"] = "0"  # for hostile.app
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
    print(_HEAD, flush=True)
    faults = 0
    for row in rows(given.attack or ATTACKS, given.server, given.quick):
        print(line(row), flush=True)
        faults += len(row.faults)
        if given.json is not None:
            run = {"when": time.strftime("%F %T"), "command": given.server, "quick": given.quick}
            with given.json.open("a") as file:
                file.write(json.dumps({**run, **row.facts()}) + "\n")
    print(f"{faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
