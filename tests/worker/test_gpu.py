"""leanserve.worker.gpu, against a module with the functions that nvidia-ml-py documents.

There is no GPU where these tests run: what a driver really says is not tried here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import wait_until
from leanserve.errors import SettingsError
from leanserve.server import check_early
from leanserve.settings import RecycleSettings, Settings
from leanserve.worker.gpu import GpuMemory, used_bytes
from leanserve.worker.lifetime import Lifetime

# What a process uses is in a file, one line "INDEX PID BYTES" each, so that a test may change it.
STAND_IN = '''
import os

class NVMLError(Exception):
    pass

class Process:
    def __init__(self, pid, used):
        self.pid, self.usedGpuMemory = pid, used

_started = False

def nvmlInit():
    global _started
    if not os.path.exists(os.environ["TEST_GPUS"]):
        raise NVMLError("Driver Not Loaded")
    _started = True

def nvmlDeviceGetCount():
    assert _started
    return 2

def nvmlDeviceGetHandleByIndex(index):
    assert 0 <= index < 2
    return ("handle", index)

def nvmlDeviceGetComputeRunningProcesses(handle):
    try:
        with open(os.environ["TEST_GPUS"]) as file:
            rows = [line.split() for line in file]
    except OSError:
        raise NVMLError("GPU is lost")
    return [
        Process(int(pid), None if used == "-" else int(used))
        for index, pid, used in rows if handle == ("handle", int(index))
    ]
'''


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of what is used; the module is on the path."""
    (tmp_path / "pynvml.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TEST_GPUS", str(tmp_path / "gpus"))
    (tmp_path / "gpus").write_text("")
    yield tmp_path / "gpus"
    sys.modules.pop("pynvml", None)


def test_all_gpus_and_only_this_process(gpus: Path) -> None:
    import pynvml

    pynvml.nvmlInit()
    gpus.write_text("0 7 100\n1 7 20\n1 8 3\n0 9 -\n")
    assert [used_bytes(pynvml, pid) for pid in (7, 8, 9, 10)] == [120, 3, 0, 0]


def test_the_driver_is_asked_now_and_then(gpus: Path) -> None:
    memory = GpuMemory()
    gpus.write_text(f"0 {os.getpid()} 100\n")
    memory.look(0.0)
    wait_until(lambda: memory.look(1.0) == 100, 10, "the thread has asked")
    gpus.write_text(f"0 {os.getpid()} 200\n")
    assert memory.look(4.9) == 100
    wait_until(lambda: memory.look(5.1) == 200, 10, "it has asked again")


def test_a_gpu_that_is_lost_is_a_warning(gpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = GpuMemory()
    gpus.unlink()
    memory.look(0.0)
    wait_until(lambda: "GPU is lost" in caplog.text, 10, "the warning")
    gpus.write_text(f"0 {os.getpid()} 5\n")
    wait_until(lambda: memory.look(10.0) == 5, 10, "it goes on asking")


def test_a_worker_beyond_its_limit(gpus: Path) -> None:
    calls: list[int] = []
    settings = RecycleSettings(limit_max_gpu_memory=1000, limit_jitter=0)
    lifetime = Lifetime(settings, lambda: calls.append(1), 0.0)
    gpus.write_text(f"0 {os.getpid()} 600\n1 {os.getpid()} 400\n")
    seconds = iter(range(10_000))

    def look() -> list[int]:
        lifetime.look(float(next(seconds)))
        return calls

    for _ in range(50):
        assert not look()
    gpus.write_text(f"0 {os.getpid()} 600\n1 {os.getpid()} 401\n")
    wait_until(look, 10, "it asks")


def test_without_a_driver(gpus: Path) -> None:
    gpus.unlink()
    with pytest.raises(SettingsError, match="driver cannot be asked: Driver Not Loaded"):
        GpuMemory()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(SettingsError, match="pip install nvidia-ml-py"):
        GpuMemory()
    monkeypatch.delitem(sys.modules, "pynvml")
    with pytest.raises(SettingsError, match="pip install nvidia-ml-py"):
        check_early("app:app", Settings.build(limit_max_gpu_memory=1 << 30))
