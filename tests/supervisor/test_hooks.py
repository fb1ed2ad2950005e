"""leanserve.supervisor.hooks, with real workers: what the operator's code is told, and when it is wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness import wait_until
from leanserve.errors import SettingsError
from leanserve.supervisor.hooks import Hooks
from supervised import APP, Supervised

HOOKS = """
import os

def note(text):
    with open("told", "a") as file:
        file.write(f"{text} in {os.getpid()}\\n")

class Told:
    def supervisor_started(self):
        note("started")
    def worker_spawned(self, pid, slot):
        note(f"spawned {pid} {slot}")
    def worker_ready(self, pid, slot):
        note(f"ready {pid} {slot}")
        raise RuntimeError("a hook that fails")
    def worker_exited(self, pid, slot, cause):
        note(f"exited {pid} {slot} {cause}")
    def supervisor_stopping(self):
        note("stopping")

told = Told()
"""


def lines(folder: Path, pid: int) -> list[str]:
    """What was told; all of it in the supervisor's process."""
    found = (folder / "told").read_text().splitlines()
    assert all(line.endswith(f" in {pid}") for line in found)
    return [line.rpartition(" in ")[0] for line in found]


def test_what_is_told(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "myhooks.py").write_text(HOOKS)
    settings: dict[str, Any] = {"workers": 2, "hooks": "myhooks:told", "app_dir": str(tmp_path)}
    with Supervised("app:app", tmp_path, settings, entry="leanserve.worker.process:main") as server:
        server.wait_ready(2)
        one, other = (line.split()[1] for line in lines(tmp_path, server.pid) if line.startswith("spawned"))
        os.kill(int(one), signal.SIGKILL)
        server.wait_ready(3)
        wait_until(lambda: len(lines(tmp_path, server.pid)) >= 8, 20, "eight lines")
        server.send(signal.SIGTERM)
        assert server.running.wait(20) == 0
        told = lines(tmp_path, server.pid)
    assert told[0] == "started"
    assert f"ready {one} 0" in told
    assert f"exited {one} 0 signal SIGKILL" in told
    assert [line for line in told if line.startswith("ready") and line.endswith(" 0")][1:]  # the successor
    assert f"ready {other} 1" in told
    assert told.index("stopping") == len(told) - 3
    assert {line.split()[0] for line in told[-2:]} == {"exited"}
    assert len(server.lines("the hook worker_ready failed")) == 3  # which harms nothing


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nosuchmodule", "cannot be imported: ModuleNotFoundError"),
        ("json:nosuch", "cannot be imported: AttributeError"),
        ("json", "has none of the functions supervisor_started, worker_spawned"),
    ],
)
def test_what_cannot_be_used(name: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=why):
        Hooks(name, str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "leanserve", "--hooks", name, "--port", "0"],
        capture_output=True, text=True, timeout=50, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert why.partition(":")[0] in done.stderr
    assert "Traceback" not in done.stderr


def test_without_hooks_nothing_is_called() -> None:
    Hooks(None, "").call("worker_ready", pid=1, slot=0)
