"""How long a worker may take to be ready, with real processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import wait_until
from supervised import Supervised

Lab = Callable[..., Supervised]
WORKER = "leanserve.worker.process:main"


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """`with lab("obey", workers=2) as it:`"""
    return lambda app, **settings: Supervised(app, tmp_path, settings)


@pytest.mark.parametrize("app", ["slow_boot", "stuck_boot"])
def test_the_first_boot(lab: Lab, app: str) -> None:
    with lab(app, workers=2, start_timeout=0.5) as it:
        assert it.wait_code() == 3
    assert "cannot start: not ready within " in it.log
    assert "(start_timeout)" in it.log


def test_a_successor(lab: Lab) -> None:
    with lab("slow_successor", workers=2, start_timeout=2.0) as it:
        it.wait_ready(2)
        before = it.pids()
        it.send(signal.SIGHUP)
        it.wait_log("replacement of worker 1 failed, the old one goes on: not ready within")
        it.wait_log("1 more workers stay as they are")
        assert it.pids() == before
        it.send(signal.SIGHUP)  # and it can be tried again
        it.wait_log("the old one goes on", 2)
        assert it.stop() == 0


def test_a_respawn_counts_as_a_crash(lab: Lab) -> None:
    with lab("slow_successor", start_timeout=2.0, restart_limit=2) as it:
        it.wait_ready()
        os.kill(it.notes("ready")[0].pid, signal.SIGKILL)
        assert it.wait_code(20) == 4
    assert len(it.lines("died: not ready within")) == 2


def test_it_may_be_extended(lab: Lab) -> None:
    with lab("longer_than_planned", start_timeout=2.5) as it:
        it.wait_ready()
        assert not it.lines("not ready within")
        assert it.stop() == 0


def test_who_is_ready_in_time_is_left_alone(lab: Lab) -> None:
    with lab("late_successor", workers=2, start_timeout=2.5) as it:
        it.wait_ready(2)
        it.send(signal.SIGHUP)
        it.wait_notes("left", 2)
        it.wait_log("has left", 2)
        it.send(signal.SIGTTIN)
        it.wait_ready(5)
        os.kill(next(iter(it.pids())), signal.SIGKILL)  # it wakes up again after everybody's time
        it.wait_ready(6)
        assert not it.lines("not ready within")
        assert it.stop() == 0


def test_who_is_ready_in_the_last_moment_stays(lab: Lab) -> None:
    """Between the report and SIGTERM there is half a second."""
    with lab("ready_when_reported", start_timeout=2.0) as it:
        it.wait_log("its stacks follow")
        it.wait_ready()
        os.kill(it.notes("ready")[0].pid, signal.SIGKILL)
        it.wait_log("died: signal SIGKILL")  # and not: not ready
        it.wait_ready(2)
        assert it.stop() == 0


def test_a_stop_while_it_is_given_up(lab: Lab) -> None:
    with lab("slow_successor", start_timeout=2.0) as it:
        it.wait_ready()
        it.send(signal.SIGHUP)
        it.wait_log("its stacks follow")
        assert it.stop() == 0


HANGS = """
import time

def load_weights():
    time.sleep(600)

load_weights()
"""

# While it is imported, by the function.
LONG_IMPORT = """
import time
import leanserve

leanserve.extend_start(60)
time.sleep(5.0)

async def app(scope, receive, send):
    pass
"""

# In its startup, by the extension.
LONG_STARTUP = """
import asyncio

async def app(scope, receive, send):
    await receive()
    scope["extensions"]["leanserve.worker"]["extend_start"](60)
    await asyncio.sleep(5.0)
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})
"""


def test_the_stacks_of_a_real_worker(tmp_path: Path) -> None:
    (tmp_path / "hanging_app.py").write_text(HANGS)
    with Supervised("hanging_app:app", tmp_path, {"start_timeout": 3.0}, entry=WORKER) as it:
        assert it.wait_code(20) == 3
    assert "in load_weights" in it.log
    assert it.log.index("its stacks follow") < it.log.index("in load_weights") < it.log.index("cannot start")


@pytest.mark.parametrize(("source", "lifespan"), [(LONG_IMPORT, "off"), (LONG_STARTUP, "on")])
def test_a_real_application_extends_it(tmp_path: Path, source: str, lifespan: str) -> None:
    (tmp_path / "long_app.py").write_text(source)
    settings = {"start_timeout": 4.0, "lifespan": lifespan}
    with Supervised("long_app:app", tmp_path, settings, entry=WORKER) as it:
        wait_until(lambda: it.lines(" ready in ") or it.lines("not ready within"), 20, "an end of the boot")
        assert not it.lines("not ready within")
        assert it.stop() == 0
