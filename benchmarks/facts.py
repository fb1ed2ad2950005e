"""What a reader has to know about a run: machine, versions, command."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS, ROOT

_BESIDE = ("uvloop", "numpy", "fastapi", "pydantic")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    """The commit that is measured, with a mark when files differ from it; empty outside a clone."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            cwd=ROOT, capture_output=True, text=True, timeout=10, check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip()


def versions(peers: Iterable[str]) -> dict[str, str]:
    """Package to version, for what these peers and the applications use."""
    names = sorted({package for peer in peers for package in PEERS[peer].packages} | set(_BESIDE))
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def facts(command: str, peers: Iterable[str], **more: Any) -> dict[str, Any]:
    """For the report, and beside the samples."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "kernel": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": versions(peers),
        **more,
    }
