"""The raw-request corpora that others wrote, when the suites lie beside this checkout."""

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
