"""The benchmark runner runs; what it measures on a busy machine is nobody's verdict."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.report import Row, Sample, rows, table

ROOT = Path(__file__).parents[1]


def test_runner(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks", "--rounds", "1", "--seconds", "0.5", "--connections", "4"]
    done = subprocess.run(
        [*command, "--peers", "leanserve,uvicorn-h11", "--json", str(report)],
        cwd=ROOT, capture_output=True, text=True, timeout=50, check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "leanserve / uvicorn-h11" in done.stdout
    facts = json.loads(report.read_text())
    assert [row["name"] for row in facts["rows"]] == ["leanserve", "uvicorn-h11"]
    assert all(sample["cpu_us"] > 0 and sample["per_s"] > 0 for sample in facts["samples"])


def test_medians_and_ratios() -> None:
    samples = [
        Sample("leanserve", 10, 100), Sample("other", 30, 50), Sample("other", 20, 70),
        Sample("leanserve", 10, 300), Sample("leanserve", 90, 200),
    ]
    found = rows(samples)
    assert found == [Row("leanserve", 10, 200, 1.0, 1.0), Row("other", 25, 60, 2.5, 0.3)]
    assert table(found).splitlines()[2].split() == ["other", "25.0", "2.50", "60", "0.30"]


@pytest.mark.parametrize("peers", ["nobody", "leanserve,nobody"])
def test_unknown_peer(peers: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--peers", peers], cwd=ROOT, capture_output=True, text=True,
        timeout=30, check=False,
    )
    assert done.returncode == 2
    assert "unknown: nobody" in done.stderr
