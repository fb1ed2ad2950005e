"""What a start leaves alone: modules that nobody needs there cost time in every start and memory for ever."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import leanserve
from harness import free_port

# Libraries of the worker, and parts of the standard library that are large.
OF_THE_WORKER = {"asyncio", "ssl", "uvloop", "anyio", "h11", "wsproto"}
OF_THE_WORKER |= {"leanserve.worker", "leanserve.transport"}
LARGE = {"logging.config", "multiprocessing", "pathlib", "pickle", "random", "subprocess", "tempfile"}
LARGE |= {"email", "http", "urllib", "ipaddress", "encodings.idna"}
LARGE |= {"tomllib"}  # our own pyproject.toml has no [tool.leanserve]

_REPORT = """
import sys
before = set(sys.modules)
try:
    {code}
except SystemExit as end:
    assert not end.code, end.code
loaded = sorted(set(sys.modules) - before)
import json
sys.stderr.write("\\n" + json.dumps(loaded) + "\\n")
"""


def report(stderr: str) -> set[str]:
    return set(json.loads(stderr.splitlines()[-1]))


def modules_of(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", _REPORT.format(code=code)], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    return report(done.stderr)


def test_the_package_alone() -> None:
    loaded = modules_of("import leanserve")
    assert {name for name in loaded if name.startswith("leanserve")} == {"leanserve", "leanserve.errors"}
    assert not loaded & {"click", "dataclasses", "inspect", "logging", "re", "socket", "typing"}


def test_every_public_name_comes_when_it_is_asked_for() -> None:
    for name in leanserve.__all__:
        assert getattr(leanserve, name) is not None
    assert {"leanserve.server", "leanserve.settings"} <= modules_of("from leanserve import Server, Settings")


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_what_only_prints_loads_no_server(option: str) -> None:
    loaded = modules_of(f"from leanserve import cli; cli.main(['{option}'])")
    assert "leanserve.settings" in loaded
    assert not loaded & {*OF_THE_WORKER, *LARGE, "leanserve.server", "leanserve.demo", "logging", "socket"}


def test_the_code_api_loads_no_event_loop() -> None:
    loaded = modules_of("from leanserve import Server; Server('nosuch:app', port=0)")
    assert not loaded & {*OF_THE_WORKER, *LARGE}


def test_a_worker_loads_protocols_when_somebody_speaks_them() -> None:
    loaded = modules_of("import leanserve.worker.process")
    assert {"asyncio", "leanserve.protocol.http1"} <= loaded
    assert not loaded & {"h11", "wsproto", "leanserve.asgi.websocket", "anyio", "email", "random"}
    assert not loaded & {"urllib.parse", "ipaddress"}


_APP = """
async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})
"""


def wait_body(url: str, process: subprocess.Popen[str]) -> bytes:
    end = time.monotonic() + 30
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                body: bytes = response.read()
                return body
        except OSError:
            time.sleep(0.05)  # nothing listens there yet
    raise AssertionError(f"no answer from {url}")


def test_the_supervisor_after_a_whole_life(tmp_path: Path) -> None:
    """It started workers, one of them answered, it waited and it drained them: this is all it needed."""
    (tmp_path / "imported_app.py").write_text(_APP)
    port = free_port()
    args = ["imported_app:app", "--app-dir", str(tmp_path), "--port", str(port), "--workers", "2"]
    code = f"from leanserve import cli; cli.main({args!r})"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("LEANSERVE_")}
    process = subprocess.Popen(
        [sys.executable, "-c", _REPORT.format(code=code)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=clean,
    )
    try:
        assert wait_body(f"http://127.0.0.1:{port}/", process) == b"ok"
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, stderr
    loaded = report(stderr)
    assert "leanserve.supervisor.supervisor" in loaded
    assert not loaded & {*OF_THE_WORKER, *LARGE, "imported_app", "leanserve.supervisor.reload"}
