"""How each server is started: one worker, uvloop where it can, no access log, defaults otherwise."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
APP = "benchmarks.app:app"
REFERENCE = "leanserve"

_UVICORN = ["uvicorn", APP, "--port", "{port}", "--loop", "uvloop", "--no-access-log", "--log-level", "error"]
COMMANDS: dict[str, list[str]] = {
    REFERENCE: [
        "leanserve", APP, "--port", "{port}", "--loop", "uvloop", "--no-access-log", "--log-level", "error",
    ],
    "uvicorn-httptools": [*_UVICORN, "--http", "httptools"],
    "uvicorn-h11": [*_UVICORN, "--http", "h11"],
    "hypercorn": ["hypercorn", APP, "--bind", "127.0.0.1:{port}", "--worker-class", "uvloop"],
    "granian": [
        "granian", "--interface", "asgi", "--port", "{port}", "--loop", "uvloop", "--no-access-log",
        "--log-level", "error", APP,
    ],
    "gunicorn-asgi": [
        "gunicorn", "--worker-class", "asgi", "--bind", "127.0.0.1:{port}", "--log-level", "error", APP,
    ],
}

_READY_WITHIN_S = 20.0
_STOP_WITHIN_S = 10.0


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_ready(port: int, process: subprocess.Popen[bytes], name: str) -> None:
    end = time.monotonic() + _READY_WITHIN_S
    while True:
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"{name} does not serve (exit code {process.returncode})")
        try:
            with socket.create_connection(("127.0.0.1", port), 1):
                return
        except OSError:
            time.sleep(0.02)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_WITHIN_S)
    except subprocess.TimeoutExpired:
        pass  # the kill below reaches it too
    # Its own session, made here: the group is this server and nobody else.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def serving(name: str) -> Iterator[tuple[int, int]]:
    """Run one server for the length of the block: its (pid, port). RuntimeError when it does not serve."""
    port = free_port()
    tool, *arguments = [part.format(port=port) for part in COMMANDS[name]]
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / tool), *arguments], cwd=ROOT, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    try:
        _wait_ready(port, process, name)
        yield process.pid, port
    finally:
        _stop(process)
