"""The supervisor with real processes and real signals: boot, death, stop, roll, more and fewer workers."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import alive, descendants, wait_until
from leanserve.errors import SettingsError
from leanserve.settings import Settings
from leanserve.supervisor.supervisor import Supervisor
from supervised import Supervised

Lab = Callable[..., Supervised]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """`with lab("obey", workers=2) as it:`"""
    return lambda app, **settings: Supervised(app, tmp_path, settings)


def connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 2).close()
    except ConnectionRefusedError:
        return False
    return True


# Boot


@pytest.mark.parametrize(
    ("app", "code", "reason", "workers"),
    [
        ("fail", 3, "no such model", 1),
        ("fail", 3, "no such model", 4),
        ("fail_settings", 2, "bad setting", 4),
        ("killed_in_boot", 3, "signal SIGSEGV", 4),
        ("failed_and_dead", 3, "last words", 4),
        ("bug", 3, "", 4),
    ],
)
def test_a_failed_boot_is_told_once(lab: Lab, app: str, code: int, reason: str, workers: int) -> None:
    with lab(app, workers=workers, log_level="info") as it:
        assert it.running.wait(10) == code
        assert time.monotonic() - it.begun_s < 4
    errors = it.lines("ERROR")
    assert len(errors) == 1, it.log
    assert f"cannot start: {reason}" in errors[0]
    assert len(it.notes("started")) <= workers
    assert ("LookupError: a bug of the entry" in it.log) is (app == "bug")
    assert "Traceback of it" not in it.log


def test_the_trace_of_a_failed_boot_is_for_debugging(lab: Lab) -> None:
    with lab("fail", log_level="debug") as it:
        assert it.running.wait(10) == 3
    assert "Traceback of it" in it.log


def test_last_words_survive_the_worker(lab: Lab) -> None:
    """A worker that speaks and dies: both are seen in one turn, whichever comes first."""
    for _ in range(4):
        with lab("failed_and_dead", workers=1) as it:
            assert it.running.wait(10) == 3
        assert len(it.lines("cannot start: last words")) == 1, it.log


def test_no_port_listens_before_the_first_is_ready(lab: Lab) -> None:
    with lab("slow_boot", workers=2) as it:
        it.wait_notes("started", 2)
        assert not connects(it.port)
        it.stop()
    assert not it.lines("listening on")


def test_too_many_workers_are_refused_at_once() -> None:
    with pytest.raises(SettingsError, match="256"):
        Supervisor("obey", Settings.build(port=0, workers=257))


def test_ports_are_bound_in_the_constructor() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(OSError, match="taken by another process"):
            Supervisor("obey", Settings.build(port=taken.getsockname()[1]))


# Deaths


def test_a_dead_worker_is_replaced_at_once(lab: Lab) -> None:
    with lab("obey", workers=2) as it:
        it.wait_ready(2)
        victim = it.notes("ready")[0]
        os.kill(victim.pid, signal.SIGKILL)
        again = it.wait_notes("ready", 3)[2]
        assert (again.slot, again.generation) == (victim.slot, 1)
        assert connects(it.port)
        (line,) = it.lines("died")
        for fact in (f"worker {victim.slot + 1}", f"pid {victim.pid}", "SIGKILL", "in flight: 0"):
            assert fact in line
        assert it.stop() == 0


def test_a_signal_without_a_name_is_told_too(lab: Lab) -> None:
    with lab("obey") as it:
        it.wait_ready()
        os.kill(it.notes("ready")[0].pid, 35)
        it.wait_ready(2)
        assert "signal 35" in it.lines("died")[0]
        assert it.stop() == 0


def test_requests_in_flight_are_those_of_the_dead_worker(lab: Lab) -> None:
    with lab("busy", restart_limit=2) as it:
        it.wait_ready()
        os.kill(it.notes("ready")[0].pid, signal.SIGKILL)
        assert it.wait_code() == 4
    counts = [line.rpartition(" ")[2] for line in it.lines("died")]
    assert counts == ["3", "0", "0"]


def test_a_crash_loop_is_slowed_down_and_ended(lab: Lab) -> None:
    with lab("ready_and_dead", restart_limit=4, restart_backoff_max=0.2) as it:
        assert it.wait_code() == 4
    assert len(it.notes("started")) == 5
    assert len(it.lines("died: exit code 7")) == 5
    assert len(it.lines("giving up")) == 1


def test_a_boot_that_fails_after_the_first_is_a_crash(lab: Lab) -> None:
    with lab("fail_later", workers=2, restart_limit=3) as it:
        it.wait_ready(2)
        os.kill(it.notes("ready")[0].pid, signal.SIGKILL)
        assert it.wait_code() == 4
    assert len(it.lines("died: no such model")) == 3
    assert not it.lines("cannot start")


def test_output_that_nobody_takes_ends_one_worker_only(lab: Lab) -> None:
    """What is left in a buffer at the end of a child must not send it into its parent's clean-up."""
    with lab("broken_stdout", workers=2, restart_limit=100) as it:
        it.wait_log("died: exit code 1", 2)
        first = next(note for note in it.notes("ready") if note.slot == 0)
        assert alive(first.pid)
        assert len([note for note in it.notes("ready") if note.slot == 0]) == 1
        assert it.stop() == 0


def test_a_program_without_standard_streams(lab: Lab) -> None:
    with lab("no_stdout") as it:
        it.wait_ready()
        assert it.stop() == 0
    assert len(it.notes("left")) == 1


def test_respawns_leak_nothing(lab: Lab) -> None:
    with lab("obey", restart_limit=1000, restart_window=0) as it:
        it.wait_ready()

        def crash(number: int) -> None:
            os.kill(it.notes("ready")[-1].pid, signal.SIGKILL)
            it.wait_ready(number + 1)

        def descriptors() -> int:
            return len(os.listdir(f"/proc/{it.pid}/fd"))

        crash(1)
        before = descriptors()
        in_worker = len(os.listdir(f"/proc/{it.notes('ready')[-1].pid}/fd"))
        for number in range(2, 52):
            crash(number)
        assert descriptors() == before
        assert len(os.listdir(f"/proc/{it.notes('ready')[-1].pid}/fd")) == in_worker
        children = Path(f"/proc/{it.pid}/task/{it.pid}/children").read_text().split()
        assert len(children) == 1  # and no zombie
        assert it.stop() == 0


def test_no_descriptor_left_for_a_respawn_is_not_the_end(lab: Lab) -> None:
    """The kernel may refuse a process for a while; the others serve on, and it is tried again."""
    with lab("obey", workers=2) as it:
        it.wait_ready(2)
        limit = resource.prlimit(it.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(it.pid, resource.RLIMIT_NOFILE, (3, limit[1]))
        os.kill(it.notes("ready")[0].pid, signal.SIGKILL)
        it.wait_log("cannot start a process")
        assert it.running.poll() is None
        resource.prlimit(it.pid, resource.RLIMIT_NOFILE, limit)
        it.wait_ready(3)
        assert it.stop() == 0


# Stops


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_drains(lab: Lab, number: signal.Signals) -> None:
    with lab("obey", workers=2) as it:
        it.wait_ready(2)
        assert it.stop(number) == 0
    assert len(it.notes("order-drain")) == 2
    assert len(it.notes("left")) == 2
    assert not it.lines("ERROR")


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_the_second_stop_hurries(lab: Lab, number: signal.Signals) -> None:
    with lab("slow_to_leave", workers=2) as it:
        it.wait_ready(2)
        it.send(signal.SIGTERM)
        it.wait_notes("order-drain", 2)
        time.sleep(0.2)
        assert it.running.poll() is None
        assert it.stop(number) == 0
    assert len(it.notes("order-hurry")) == 2
    assert len(it.lines("stopping at once")) == 1


def test_sigquit_waits_for_nobody(lab: Lab) -> None:
    with lab("stubborn", workers=2, drain_timeout=60) as it:
        it.wait_ready(2)
        it.send(signal.SIGQUIT)
        it.send(signal.SIGQUIT)
        assert it.wait_code(5) == 0


@pytest.mark.parametrize(("app", "workers"), [("slow_boot", 1), ("slow_boot", 4), ("stuck_boot", 2)])
def test_a_boot_is_cut_short(lab: Lab, app: str, workers: int) -> None:
    with lab(app, workers=workers, drain_timeout=60) as it:
        it.wait_notes("started", workers)
        begun = time.monotonic()
        assert it.stop() == 0
        assert time.monotonic() - begun < 4
    assert not it.lines("cannot start")


def test_who_does_not_leave_is_killed(lab: Lab) -> None:
    with lab("stubborn", workers=2, drain_timeout=0.2, kill_grace=0.2, lifespan_shutdown_timeout=0.1) as it:
        it.wait_ready(2)
        begun = time.monotonic()
        assert it.stop() == 0
        assert time.monotonic() - begun >= 0.5
    assert len(it.lines("did not leave in time: SIGKILL")) == 2


def test_a_lifespan_that_may_take_for_ever_is_not_killed(lab: Lab) -> None:
    with lab(
        "stubborn", drain_timeout=0, drain_idle_timeout=0, kill_grace=0, lifespan_shutdown_timeout=None
    ) as it:
        it.wait_ready()
        it.send(signal.SIGTERM)
        time.sleep(2.6)
        assert it.running.poll() is None
        assert it.stop(signal.SIGQUIT) == 0


def test_a_stop_while_a_worker_waits_for_its_respawn(lab: Lab) -> None:
    with lab("ready_and_dead", workers=1, restart_backoff_max=60, restart_limit=50) as it:
        it.wait_notes("started", 6)
        assert it.stop() == 0
    started = len(it.notes("started"))
    time.sleep(0.2)
    assert len(it.notes("started")) == started


def test_a_stop_in_the_last_moment_of_a_stop(lab: Lab) -> None:
    """Signals may come at any time; the exit code stays."""
    with lab("obey", workers=2) as it:
        it.wait_ready(2)
        while it.running.poll() is None:
            it.send(signal.SIGTERM)
            time.sleep(0.001)
        assert it.wait_code() == 0


# More and fewer


def test_a_worker_more_and_a_worker_less(lab: Lab) -> None:
    with lab("obey", workers=1) as it:
        it.wait_ready(1)
        for count in (2, 3):
            it.send(signal.SIGTTIN)
            it.wait_ready(count)
        assert [note.slot for note in it.notes("ready")] == [0, 1, 2]
        for count in (1, 2):
            it.send(signal.SIGTTOU)
            it.wait_notes("left", count)
        it.send(signal.SIGTTOU)
        it.wait_log("the last worker stays")
        assert [note.slot for note in it.notes("order-leave")] == [2, 1]
        assert len(it.pids()) == 1
        for _ in range(20):
            assert connects(it.port)
        assert it.stop() == 0


def test_a_removed_worker_that_will_not_go_takes_its_listener_with_it(lab: Lab) -> None:
    """Its siblings hold copies of the socket: left open, every second connection would wait for ever."""
    with lab("stubborn", workers=3, drain_timeout=0.1, kill_grace=0.1, lifespan_shutdown_timeout=0) as it:
        it.wait_ready(3)
        it.send(signal.SIGTTOU)
        it.wait_log("SIGKILL")
        wait_until(lambda: len(it.pids()) == 2, 5, "it is gone")
        time.sleep(0.2)
        table = subprocess.run(["ss", "-Hltn", f"sport = :{it.port}"], capture_output=True, text=True)
        assert len(table.stdout.splitlines()) == 2, table.stdout
        assert it.stop(signal.SIGQUIT) == 0


def test_a_removed_slot_may_come_back_while_its_worker_drains(lab: Lab) -> None:
    with lab("slow_to_leave", workers=2) as it:
        it.wait_ready(2)
        it.send(signal.SIGTTOU)
        it.wait_notes("order-leave", 1)
        it.send(signal.SIGTTIN)
        it.wait_ready(3)
        assert [note.slot for note in it.notes("ready")].count(1) == 2
        assert len(it.pids()) == 3
        it.send(signal.SIGTERM)
        it.wait_notes("order-drain", 2)
        assert it.stop() == 0


def test_a_slot_removed_during_its_replacement(lab: Lab) -> None:
    with lab("slow_successor", workers=2) as it:
        it.wait_ready(2)
        it.send(signal.SIGHUP)  # slot 0 hangs in its replacement
        it.wait_notes("started", 3)
        it.send(signal.SIGTTOU)
        it.wait_notes("left", 1)
        assert it.notes("left")[0].slot == 1
        assert it.stop() == 0
    assert len(it.notes("started")) == 3


# The parent


def test_an_orphan_sees_the_end_of_its_channel(lab: Lab) -> None:
    """No sibling keeps a copy of the supervisor's end open."""
    with lab("obey", workers=4) as it:
        it.wait_ready(4)
        workers = it.pids()
        it.running.kill()
        wait_until(lambda: not any(map(alive, workers)), 3, "all are gone")
        socket.create_server(("127.0.0.1", it.port)).close()
    assert len(it.notes("left")) == 4


def test_the_parent_stays_small(lab: Lab) -> None:
    with lab("parent_modules") as it:
        it.wait_ready()
        status = Path(f"/proc/{it.pid}/status").read_text()
        kilobytes = int(status.partition("VmRSS:")[2].split()[0])
        assert kilobytes < 40_000
        journal = (it.folder / "journal").read_text()
        assert "modules: " in journal, journal
        assert it.stop() == 0


def test_strangers_are_left_to_their_parents(tmp_path: Path) -> None:
    """A supervisor inside a program with children of its own takes none of their exit codes."""
    script = (
        "import subprocess, sys, threading, os, signal, time\n"
        "from leanserve.settings import Settings\n"
        "from leanserve.supervisor.supervisor import Supervisor\n"
        "stranger = subprocess.Popen([sys.executable, '-c', 'raise SystemExit(5)'])\n"
        "def stop():\n    time.sleep(1)\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "threading.Thread(target=stop, daemon=True).start()\n"
        "code = Supervisor('obey', Settings.build(port=0), entry='stand_ins:main').run()\n"
        "print(code, stranger.wait())\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=20, check=False,
    )
    assert done.stdout == "0 5\n", done.stderr


_CAN_UNSHARE = (
    subprocess.run(["unshare", "-p", "-f", "true"], capture_output=True, check=False).returncode == 0
    if sys.platform == "linux"
    else False
)


@pytest.mark.skipif(not _CAN_UNSHARE, reason="needs the right to make a PID namespace")
def test_as_pid_1_it_reaps_strangers_and_its_own_keep_their_codes(tmp_path: Path) -> None:
    namespace = ("unshare", "-p", "-f", "--mount-proc", "--kill-child")
    with Supervised("leaves_orphans", tmp_path, {"restart_limit": 12}, prefix=namespace) as it:
        it.wait_log("died: exit code 7", 4)
        wait_until(lambda: len(it.notes("orphan-ends")) >= 4, 5, "the orphans end")
        (supervisor,) = _children(it.pid)
        os.kill(supervisor, signal.SIGSTOP)  # so that no respawn is counted
        zombies = [pid for pid in _children(supervisor) if not alive(pid)]
        os.kill(supervisor, signal.SIGCONT)
        assert len(zombies) <= 2  # those of the last moment
        os.kill(supervisor, signal.SIGTERM)
        assert it.running.wait(10) == 0
    assert not it.lines("exit code 0;")


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# Start method spawn


def test_spawned_workers(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"workers": 2, "start_method": "spawn"}
    with Supervised("obey", tmp_path, settings) as it:
        it.wait_ready(2)
        assert connects(it.port)
        os.kill(it.notes("ready")[0].pid, signal.SIGKILL)
        it.wait_ready(3)
        it.send(signal.SIGHUP)
        it.wait_notes("left", 2)
        wait_until(lambda: len(descendants(it.pid)) == 2, 10, "the old workers to be gone")
        assert it.stop() == 0
    assert not it.lines("ERROR")[1:]


def test_spawn_needs_names() -> None:
    supervisor = Supervisor(lambda: None, Settings.build(port=0, start_method="spawn"))
    with pytest.raises(SettingsError, match="names, not objects"):
        supervisor.run()
