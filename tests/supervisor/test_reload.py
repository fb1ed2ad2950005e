"""Reload: a save starts the workers anew; the process that watches, and which files it watches."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import alive, wait_until
from leanserve.errors import SettingsError
from leanserve.settings import ReloadSettings
from leanserve.supervisor.reload import Watcher, matches
from supervised import APP, Supervised, begin, get


@pytest.mark.parametrize(
    ("path", "include", "exclude", "expected"),
    [
        ("/a/b.py", ("*.py",), (), True),
        ("/a/b.txt", ("*.py",), (), False),
        ("/a/b.txt", ("*.py", "*.txt"), (), True),
        ("/a/b.py", ("*.py",), ("b.*",), False),
        ("/a/b.py", ("*.py",), ("/a/*",), False),
        ("/a/b.py", ("/a/*",), (), True),
        ("/a/b.py", (), (), False),
    ],
)
def test_which_files_count(
    path: str, include: tuple[str, ...], exclude: tuple[str, ...], expected: bool
) -> None:
    assert matches(path, ReloadSettings(reload_include=include, reload_exclude=exclude)) is expected


def test_a_directory_that_is_not_there() -> None:
    with pytest.raises(SettingsError, match="/no/such"):
        Watcher(ReloadSettings(reload_dir=("/no/such",)))


def test_a_watcher_that_dies_is_told_once(tmp_path: Path) -> None:
    """Its pipe is readable for ever then: the supervisor must neither spin nor end."""
    settings = {"reload": True, "reload_dir": [str(tmp_path)]}
    with Supervised("obey", tmp_path, settings) as it:
        it.wait_ready()
        (watcher,) = it.pids() - {it.notes("ready")[0].pid}
        os.kill(watcher, signal.SIGKILL)
        it.wait_log("watches for changes has died")
        before = _cpu_ticks(it.pid)
        time.sleep(0.5)
        assert _cpu_ticks(it.pid) - before < 10
        assert not Path(f"/proc/{watcher}").exists()
        assert it.stop() == 0
    assert len(it.lines("watches for changes")) == 1


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_the_watcher_goes_with_its_parent(tmp_path: Path) -> None:
    settings = {"reload": True, "reload_dir": [str(tmp_path)]}
    with Supervised("obey", tmp_path, settings) as it:
        it.wait_ready()
        family = it.pids()
        assert len(family) == 2
        it.running.kill()
        wait_until(lambda: not any(map(alive, family)), 4, "all are gone")


@pytest.fixture
def edited(tmp_path: Path) -> Iterator[tuple[Supervised, Path]]:
    source = tmp_path / "edited.py"
    source.write_text(_answers("one"))
    settings = {
        "reload": True, "reload_delay": 0.05, "reload_grace": 1, "reload_dir": [str(tmp_path)],
        "log_level": "info",
    }
    it = Supervised("edited:app", tmp_path, settings, entry="leanserve.worker.process:main")
    with it:
        yield it, source


def _answers(word: str) -> str:
    return APP.replace("str(os.getpid()).encode()", f"b'{word}'")


def _answer(it: Supervised) -> bytes:
    try:
        return get(it.port)
    except OSError:
        return b""


def test_reload(edited: tuple[Supervised, Path]) -> None:
    it, source = edited
    it.wait_ready()
    assert get(it.port) == b"one"
    source.write_text(_answers("second"))
    wait_until(lambda: _answer(it) == b"second", 10, f"the new answer\n{it.log}")
    source.write_text("this is no Python")
    it.wait_log("cannot start")
    time.sleep(0.3)
    assert it.running.poll() is None
    source.write_text(_answers("a third"))
    wait_until(lambda: _answer(it) == b"a third", 10, "and on it goes")
    with begin(it.port, "/block"):  # whatever it is busy with
        time.sleep(0.2)
        source.write_text(_answers("the fourth"))
        wait_until(lambda: _answer(it) == b"the fourth", 10, "a blocked worker is no hindrance")
    assert it.stop() == 0


POOLED = """
import asyncio, os, time
from concurrent.futures import ProcessPoolExecutor

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        pool = ProcessPoolExecutor(1)
        with open("pooled", "a") as file:
            file.write(f"{pool.submit(os.getpid).result()}\\n")
        await send({"type": "lifespan.startup.complete"})
        await receive()
        pool.shutdown()
        await send({"type": "lifespan.shutdown.complete"})
    elif scope["path"] == "/block":
        time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whose children there are")
def test_what_the_application_has_started_goes_with_its_worker(edited: tuple[Supervised, Path]) -> None:
    """A pool of processes, and a handler that blocks: the worker is killed, and its pool with it."""
    it, source = edited
    it.wait_ready()
    source.write_text(POOLED)
    pids = it.folder / "pooled"
    wait_until(lambda: pids.exists() and it.lines(" ready in ")[1:], 15, "the pool is there")
    (first,) = map(int, pids.read_text().split())
    assert alive(first)
    with begin(it.port, "/block"):
        time.sleep(0.2)
        source.write_text(POOLED + "# new\n")
        it.wait_log(" ready in ", 3, within_s=20)
        assert it.lines("did not leave in time")
        wait_until(lambda: not alive(first), 10, "the old pool has gone")
    assert it.stop() == 0


def test_a_reload_starts_with_an_error(edited: tuple[Supervised, Path]) -> None:
    """The first boot may fail, too: the next save is what counts."""
    it, source = edited
    source.write_text("this is no Python")
    wait_until(lambda: it.lines("cannot start") or it.lines("ready in"), 10, "it tried")
    it.wait_log("cannot start")
    source.write_text(_answers("well"))
    wait_until(lambda: _answer(it) == b"well", 10, "it serves")
    assert it.stop() == 0
