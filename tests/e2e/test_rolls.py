"""Reloads and recycling of real workers under load: whoever asks is answered."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import Load, Serving, descendants, wait_until

Serve = Callable[..., Serving]

# Answers with its pid. A file makes it fail, /grow costs memory, and starting it may take a while.
APP = """
import os, time

if os.path.exists(os.environ["TEST_BROKEN"]):
    raise ValueError("no weights")
time.sleep(float(os.environ.get("TEST_START_S", "0")))
kept = []

async def app(scope, receive, send):
    if scope["path"] == "/grow":
        kept.append(b"x" * (1 << 20))
    body = str(os.getpid()).encode()
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
"""


@pytest.fixture
def start(serve: Serve, tmp_path: Path) -> Serve:
    """A server of APP; `broken` beside it makes that fail."""
    (tmp_path / "rolled_app.py").write_text(APP)

    def start_it(*options: str, **environment: str) -> Serving:
        environment = {"TEST_BROKEN": str(tmp_path / "broken"), **environment}
        fixed = ("--lifespan", "off", "--log-level", "debug", "--app-dir", str(tmp_path))
        return serve("rolled_app:app", *fixed, *options, environment=environment)

    return start_it


def most_at_once(server: Serving) -> int:
    """The largest number of workers that lived together, as the supervisor's log has it."""
    living = most = 0
    for line in server.output.splitlines():
        if re.search(r"worker \d+ \(pid \d+\) started", line):
            living += 1
        elif " has left" in line or " died: " in line:
            living -= 1
        most = max(most, living)
    return most


def wait_output(server: Serving, word: str, count: int = 1, within_s: float = 30.0) -> None:
    wait_until(lambda: server.output.count(word) >= count, within_s, f"{count} x {word!r}")


@pytest.mark.parametrize(
    ("workers", "options", "most"),
    [
        (1, ("--roll-strategy", "stop-first"), 1),
        (3, ("--roll-strategy", "stop-first"), 3),
        (4, ("--max-surge", "2"), 6),
    ],
)
def test_a_reload_loses_nothing(start: Serve, workers: int, options: tuple[str, ...], most: int) -> None:
    server = start("--workers", str(workers), *options, TEST_START_S="0.3")
    before = server.worker_pids(workers)
    with Load(server) as load:
        load.wait_answered(100)
        server.running.send_signal(signal.SIGHUP)
        wait_until(lambda: not before & descendants(server.pid), 40, "the old workers are gone")
        wait_output(server, " ready in ", 2 * workers)
        load.wait_answered(100)
    assert load.failures == []
    assert load.refused == 0
    assert most_at_once(server) == most
    assert not server.worker_pids(workers) & before


def test_a_successor_that_fails_leaves_the_old_one(start: Serve, tmp_path: Path) -> None:
    server = start("--workers", "2", "--log-level", "info")
    before = server.worker_pids(2)
    with Load(server) as load:
        load.wait_answered(50)
        (tmp_path / "broken").touch()
        server.running.send_signal(signal.SIGHUP)
        wait_output(server, "the old one goes on: importing")
        load.wait_answered(200)
        (tmp_path / "broken").unlink()
        assert server.worker_pids(2) == before
        server.running.send_signal(signal.SIGHUP)
        wait_until(lambda: not before & descendants(server.pid), 30, "the old workers are gone")
    assert load.failures == []
    assert load.refused == 0


def test_stop_first_waits_for_a_successor_that_fails(start: Serve, tmp_path: Path) -> None:
    """What the kernel has queued for the slot is answered by the one that starts at last."""
    server = start("--workers", "2", "--roll-strategy", "stop-first", "--log-level", "info")
    before = server.worker_pids(2)
    with Load(server) as load:
        load.wait_answered(50)
        (tmp_path / "broken").touch()
        server.running.send_signal(signal.SIGHUP)
        wait_output(server, "died: importing")
        (tmp_path / "broken").unlink()
        wait_output(server, " ready in ", 3)
        assert len(before & descendants(server.pid)) == 1  # the other one was spared
        load.wait_answered(100)
    assert load.failures == []
    assert load.refused == 0


def test_four_workers_recycled_by_requests(start: Serve) -> None:
    server = start("--workers", "4", "--limit-max-requests", "100", "--limit-max-requests-jitter", "20")
    with Load(server, threads=8) as load:
        load.wait_answered(2000, 50)
        wait_until(lambda: len(load.answered) >= 8, 50, "several lives")
    assert load.failures == []
    assert load.refused == 0
    assert most_at_once(server) == 5
    assert "asks for a successor: 1" in server.output  # between 100 and 120 requests


def test_workers_recycled_by_age(start: Serve) -> None:
    server = start("--workers", "2", "--limit-max-age", "2")
    before = server.worker_pids(2)
    with Load(server) as load:
        wait_until(lambda: not before & descendants(server.pid), 40, "both are new")
        load.wait_answered(50)
    assert load.failures == []
    assert load.refused == 0
    assert most_at_once(server) == 3
    assert "asks for a successor: its age" in server.output


def test_a_worker_that_grows(start: Serve) -> None:
    server = start("--workers", "2", "--limit-max-rss", "200m")
    before = server.worker_pids(2)
    with Load(server, "/grow") as load:
        wait_until(lambda: not before & descendants(server.pid), 40, "both have grown and are new")
        load.wait_answered(50)
    assert load.failures == []
    assert load.refused == 0
    assert most_at_once(server) == 3
    assert "MiB of resident memory" in server.output


GPU = """
import os

class NVMLError(Exception):
    pass

class Process:
    def __init__(self, pid, used):
        self.pid, self.usedGpuMemory = pid, used

def nvmlInit():
    pass

def nvmlDeviceGetCount():
    return 1

def nvmlDeviceGetHandleByIndex(index):
    return index

def nvmlDeviceGetComputeRunningProcesses(handle):
    with open(os.environ["TEST_GPU"]) as file:
        return [Process(int(line), 6 << 30) for line in file]
"""


def test_a_worker_that_grows_on_a_gpu(start: Serve, tmp_path: Path) -> None:
    """With a module in the place of nvidia-ml-py: there is no GPU here."""
    (tmp_path / "pynvml.py").write_text(GPU)
    (tmp_path / "gpu").write_text("")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    server = start(
        "--workers", "2", "--limit-max-gpu-memory", "4g", TEST_GPU=str(tmp_path / "gpu"), PYTHONPATH=path
    )
    before = server.worker_pids(2)
    grown = min(before)
    (tmp_path / "gpu").write_text(f"{grown}\n")
    with Load(server) as load:
        wait_until(lambda: grown not in descendants(server.pid), 40, "it is new")
        load.wait_answered(50)
    assert load.failures == []
    assert "6144 MiB of GPU memory" in server.output
    assert before - {grown} <= descendants(server.pid)


def test_auto_says_why(serve: Serve) -> None:
    server = serve("raw_app:app", "--workers", "auto", "--worker-memory", "1000000g")
    assert re.search(
        r"workers=auto is 1: \d+ CPUs? by affinity.*, \d+ MiB of memory for workers of 1024000000 MiB",
        server.output,
    )
    server.worker_pids(1)
