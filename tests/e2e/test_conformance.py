"""The suites that others wrote, when they lie beside this checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(
    os.environ.get("LEANSERVE_CONFORMANCE", Path(__file__).parents[3] / "shared" / "conformance")
)

ROOT = Path(__file__).parents[2]

# Refused on purpose: RFC 9110 section 4.2.4 says that userinfo SHOULD be treated as an error.
STRICTER = {
    "gunicorn/valid/rfc9112_target_absolute_userinfo_01",
    "llhttp/uri/host:port` and basic auth",
}


@pytest.mark.timeout(120)
def test_http1(tmp_path: Path) -> None:
    if not (SUITE / "http1.py").is_file():
        pytest.skip("the conformance suites are not here; LEANSERVE_CONFORMANCE names their folder")
    server = f"{sys.executable} -m leanserve app:app --port {{port}}"
    command = [sys.executable, str(SUITE / "http1.py"), "--cmd", server]
    done = subprocess.run(
        [*command, "--name", "leanserve", "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=110, check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = next(json.loads(path.read_text()) for path in tmp_path.rglob("*.json"))
    assert report["alive"]
    assert report["table"]["ALL"]["PASS"] >= 265
    others = {name: case["grade"] for name, case in report["cases"].items()}
    assert {name for name, grade in others.items() if grade != "STRICT"} == set(), others
    assert set(others) <= STRICTER, others


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("loop", "fastpath"), [("uvloop", "1"), ("asyncio", "0")])
def test_autobahn(tmp_path: Path, loop: str, fastpath: str) -> None:
    """Sections 1 to 7 and 10: all but limits and compression, which take half an hour (benchmarks/notes)."""
    wstest = ROOT / ".dev" / "autobahn" / "bin" / "wstest"
    if not (SUITE / "autobahn.py").is_file():
        pytest.skip("the conformance suites are not here; LEANSERVE_CONFORMANCE names their folder")
    if not wstest.is_file():
        pytest.skip("the Autobahn testsuite is not installed: tests/run.py does it where Python 2.7 is")
    server = f"{sys.executable} -m leanserve app:app --port {{port}} --loop {loop} --no-access-log"
    sections = ",".join(f"{number}.*" for number in (1, 2, 3, 4, 5, 6, 7, 10))
    command = [sys.executable, str(SUITE / "autobahn.py"), "--cmd", server, "--name", "leanserve"]
    done = subprocess.run(
        [*command, "--cases", sections, "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=140, check=False,
        env={**os.environ, "WSTEST": str(wstest), "LEANSERVE_FASTPATH": fastpath},
    )
    (index,) = tmp_path.rglob("index.json")
    cases = json.loads(index.read_text())["leanserve"]
    assert len(cases) == 247, done.stdout + done.stderr
    bad = {
        name: (case["behavior"], case["behaviorClose"])
        for name, case in cases.items()
        if not {case["behavior"], case["behaviorClose"]} <= {"OK", "INFORMATIONAL"}
    }
    assert bad == {}
