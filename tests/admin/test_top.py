"""``leanserve top``: the picture, and how it gets to a terminal and elsewhere."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness import wait_until
from leanserve.admin.status import Rates, build_status
from leanserve.admin.top import draw
from leanserve.admin.view import look
from leanserve.scoreboard import Scoreboard, WorkerState
from leanserve.settings import AdminSettings
from leanserve.tally import Tally
from supervised import APP, Supervised, get

S = 1_000_000_000


def status_at(seconds: int, requests: int, durations: list[float]) -> dict[str, Any]:
    """Two workers so long after the start; the first has done so much."""
    board = Scoreboard.create()
    board.tell_server(pid=9, born_ns=100 * S, ready_ns=101 * S, slots=2)
    for slot in (0, 1):
        lane = board.lane(slot, 0)
        lane.begin(50 + slot, 0)
        lane.enter(WorkerState.READY, 101 * S)
        lane.beat((100 + seconds) * S)
    lane = board.lane(0, 0)
    lane.count_done(requests, 0, 2_000_000 * seconds)
    tally = Tally()
    tally.plain[2] += durations
    lane.tell_tally(tally)
    board.lane(1, 0).tell_app_ready(False)
    status = build_status(look(board, (100 + seconds) * S), AdminSettings(), Rates())
    board.close()
    return status


def test_of_the_whole_life() -> None:
    text = "\n".join(draw(status_at(10, 50, [0.003, 0.003, 1.5])))
    assert "pid 9  running  up 10 s" in text
    assert "ready: 1 of 2 workers ready, 1 wanted" in text
    assert "requests 5.0/s" in text
    assert "out 2.0 MB/s" in text
    assert "responses  2xx 3" in text
    assert "duration    p50 < 3.91 ms  p90 < 2 s  p99 < 2 s" in text
    assert "chunk gap   nothing to tell" in text
    assert re.search(r"2\s+51 not ready", text)
    bars = [line.count("#") for line in text.splitlines() if "#" in line]
    assert bars == [40, 20]


def test_of_the_time_between_two_looks() -> None:
    before, now = status_at(10, 50, [0.003]), status_at(12, 80, [0.003, 600.0])
    text = "\n".join(draw(now, before))
    assert "requests 15.0/s" in text
    assert re.search(r"1\s+50 ready .* 15\.0\n", text)
    assert "duration    p50 < for ever" in text
    assert [line.split()[-1] for line in text.splitlines() if "#" in line] == ["1"]


def test_another_server_has_no_before() -> None:
    before, now = status_at(10, 50, []), status_at(2, 8, [])
    before["server"]["pid"] = 8
    assert "requests 4.0/s" in "\n".join(draw(now, before))


@pytest.fixture
def server(tmp_path: Path) -> Supervised:
    (tmp_path / "served_app.py").write_text(APP)
    return Supervised("served_app:app", tmp_path, {}, entry="leanserve.worker.process:main")


def test_what_is_no_terminal_gets_one_picture(server: Supervised) -> None:
    with server as it:
        it.wait_ready()
        get(it.port)
        command = [sys.executable, "-m", "leanserve", "top", "--pid", str(it.pid)]
        for more, pictures in (([], 1), (["--count", "3", "--interval", "0.1"], 3)):
            done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=30)
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.count("leanserve ") == pictures
            assert "\x1b" not in done.stdout
        assert it.stop() == 0


def test_a_terminal_gets_its_screen_back(server: Supervised) -> None:
    ours, theirs = pty.openpty()
    with server as it:
        it.wait_ready()
        command = [sys.executable, "-m", "leanserve", "top", "--interval", "0.2", "--pid", str(it.pid)]
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        os.set_blocking(ours, False)
        seen = bytearray()

        def pictures() -> int:
            try:
                seen.extend(os.read(ours, 65536))
            except (BlockingIOError, OSError):
                pass
            return seen.count(b"\x1b[H")

        try:
            wait_until(lambda: pictures() >= 3, 20, "three pictures")
            process.send_signal(signal.SIGINT)
            wait_until(lambda: (pictures(), process.poll())[1] is not None, 10, "its end")
            pictures()
        finally:
            process.kill()
            process.wait()
            os.close(ours)
        assert process.returncode == 0
        assert seen.startswith(b"\x1b[?1049h\x1b[?25l")
        assert seen.endswith(b"\x1b[?25h\x1b[?1049l")
        assert it.stop() == 0


def test_nobody_to_look_at(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "leanserve", "top", "--socket", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no server answers on" in done.stderr
