"""``--preload``: one import, workers forked from it, and all else as it is without."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import Load, Serving, alive, wait_until
from leanserve.errors import SettingsError
from leanserve.server import check_early
from leanserve.settings import Settings
from leanserve.supervisor.template import inheriting_orphans
from supervised import Supervised, begin, get

REAL = "leanserve.worker.process:main"
MIB = 1 << 20

# It tells who answers, who imported it, what it saw then, and how its lifespan went.
APP = """
import gc, json, os
VERSION = 1
IMPORTED_BY = os.getpid()
WORKER_AT_IMPORT = os.environ.get("LEANSERVE_WORKER")
started_in = []

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        started_in.append(os.getpid())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    facts = {
        "pid": os.getpid(), "parent": os.getppid(), "imported_by": IMPORTED_BY, "version": VERSION,
        "frozen": gc.get_freeze_count(), "worker_at_import": WORKER_AT_IMPORT, "started_in": started_in,
        **dict(os.environ.items()),
    }
    await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": json.dumps(facts).encode()})
"""

THREAD = """
import threading, time
threading.Thread(target=time.sleep, args=(60,), name="refresher", daemon=True).start()
"""
NATIVE_THREAD = """
import _thread, time
_thread.start_new_thread(time.sleep, (60,))
time.sleep(0.1)
"""
CUDA = """
import sys, types
sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: True))
"""

Lab = Callable[..., Supervised]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """`with lab(text, workers=2) as it:`"""
    # From Python 3.12 on a fork beside threads is worth one.
    monkeypatch.setenv("PYTHONWARNINGS", "always::DeprecationWarning")

    def make(text: str = APP, **settings: Any) -> Supervised:
        (tmp_path / "loaded_app.py").write_text(text)
        flat = {"preload": True, "log_level": "debug", **settings}
        return Supervised("loaded_app:app", tmp_path, flat, entry=REAL)

    return make


def ask(it: Supervised) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(get(it.port))
    return facts


def ask_all(it: Supervised, count: int) -> dict[str, dict[str, Any]]:
    """By slot, what so many different workers say."""
    found: dict[str, dict[str, Any]] = {}

    def enough() -> bool:
        facts = ask(it)
        found[facts["LEANSERVE_WORKER"]] = facts
        return len(found) >= count

    wait_until(enough, 20, f"answers of {count} workers, so far {found}")
    return found


def test_one_import_and_as_many_workers_as_ever(lab: Lab) -> None:
    with lab(workers=3, worker_env=["GPU=a;b;c"]) as it:
        it.wait_ready(3)
        found = ask_all(it, 3)
        (template,) = {facts["imported_by"] for facts in found.values()}
        assert {facts["parent"] for facts in found.values()} == {it.pid}
        assert all(facts["started_in"] == [facts["pid"]] for facts in found.values())
        assert all(facts["frozen"] > 1000 for facts in found.values())
        assert {facts["worker_at_import"] for facts in found.values()} == {None}
        assert {slot: facts["GPU"] for slot, facts in found.items()} == {"0": "a", "1": "b", "2": "c"}
        assert it.pids() == {template, *(facts["pid"] for facts in found.values())} != {template}
        assert it.stop() == 0
    assert not it.lines("Warning")


def test_a_killed_worker_comes_from_the_same_import(lab: Lab) -> None:
    with lab(workers=2) as it:
        it.wait_ready(2)
        before = ask_all(it, 2)
        os.kill(before["0"]["pid"], signal.SIGKILL)
        it.wait_log("died: signal SIGKILL")
        it.wait_ready(3)
        wait_until(lambda: ask_all(it, 2)["0"]["pid"] != before["0"]["pid"], 20, "a successor")
        assert ask_all(it, 2)["0"]["imported_by"] == before["0"]["imported_by"]
        assert len(it.lines("has imported the application")) == 1
        assert it.stop() == 0


def test_a_roll_has_the_new_code(lab: Lab, tmp_path: Path) -> None:
    with lab(workers=2) as it:
        it.wait_ready(2)
        before = ask(it)
        (tmp_path / "loaded_app.py").write_text(APP.replace("VERSION = 1", "VERSION = 22"))
        it.send(signal.SIGHUP)
        it.wait_ready(4)
        wait_until(lambda: all(ask(it)["version"] == 22 for _ in range(8)), 20, "the new code")
        wait_until(lambda: not alive(before["imported_by"]), 20, "the end of the old template")
        assert it.stop() == 0


def test_a_roll_whose_import_fails_changes_nothing(lab: Lab, tmp_path: Path) -> None:
    with lab(workers=2, log_level="info") as it:
        it.wait_ready(2)
        before = {facts["pid"] for facts in ask_all(it, 2).values()}
        (tmp_path / "loaded_app.py").write_text("raise RuntimeError('new and broken')")
        it.send(signal.SIGHUP)
        it.wait_log("the old one goes on: importing loaded_app failed: RuntimeError: new and broken")
        victim = ask(it)["pid"]
        os.kill(victim, signal.SIGKILL)  # the template that is left still serves
        it.wait_ready(3)
        after = {facts["pid"] for facts in ask_all(it, 2).values()}
        assert len(after - before) == 1
        assert victim not in after
        (tmp_path / "loaded_app.py").write_text(APP.replace("VERSION = 1", "VERSION = 333"))
        it.send(signal.SIGHUP)
        it.wait_ready(5)
        wait_until(lambda: all(ask(it)["version"] == 333 for _ in range(8)), 20, "the repaired code")
        assert it.stop() == 0


def test_a_second_roll_while_the_first_imports(lab: Lab, tmp_path: Path) -> None:
    with lab(workers=1) as it:
        it.wait_ready()
        (tmp_path / "loaded_app.py").write_text("import time\ntime.sleep(60)")
        it.send(signal.SIGHUP)
        it.wait_log("importing the application anew")
        (tmp_path / "loaded_app.py").write_text(APP.replace("VERSION = 1", "VERSION = 22"))
        it.send(signal.SIGHUP)
        it.wait_ready(2)
        wait_until(lambda: ask(it)["version"] == 22, 20, "the newest code")
        assert it.stop() == 0


def test_a_killed_template_is_made_anew(lab: Lab) -> None:
    with lab(workers=2) as it:
        it.wait_ready(2)
        first = ask(it)
        os.kill(first["imported_by"], signal.SIGKILL)
        it.wait_log("died: signal SIGKILL; a new one is made in 0.0 s")
        os.kill(first["pid"], signal.SIGKILL)
        it.wait_log("has imported the application", 2)
        it.wait_ready(3)
        found = ask_all(it, 2)
        assert {facts["imported_by"] for facts in found.values()} > {first["imported_by"]}
        assert it.stop() == 0


def test_a_template_that_cannot_be_made_anew_is_tried_again(lab: Lab, tmp_path: Path) -> None:
    with lab(workers=1, restart_backoff_max=0.3, log_level="info") as it:
        it.wait_ready()
        first = ask(it)
        (tmp_path / "loaded_app.py").write_text("raise RuntimeError('broken meanwhile')")
        os.kill(first["imported_by"], signal.SIGKILL)
        it.wait_log("broken meanwhile", 2)
        assert ask(it)["pid"] == first["pid"]
        (tmp_path / "loaded_app.py").write_text(APP)
        it.wait_log("has imported the application", 2)
        assert it.stop() == 0


@pytest.mark.parametrize(
    ("text", "code", "reason"),
    [
        ("raise RuntimeError('no model')", 3, "importing loaded_app failed: RuntimeError: no model"),
        ("nothing = 1", 3, "has no attribute 'app'"),
        ("import os; os.kill(os.getpid(), 11)", 3, "signal SIGSEGV"),
        (THREAD, 3, "1 thread runs (refresher)"),
        (NATIVE_THREAD, 3, "1 native thread runs (python"),
        (CUDA, 3, "CUDA is initialised (torch.cuda)"),
    ],
)  # fmt: skip
def test_a_boot_that_is_refused(lab: Lab, text: str, code: int, reason: str) -> None:
    with lab(text + "\n" + APP if "nothing" not in text else text, workers=2, log_level="info") as it:
        assert it.running.wait(20) == code
    (line,) = it.lines("ERROR")
    assert "cannot start: " in line
    assert reason in line
    assert not it.lines("Warning")


def test_what_does_not_fork_ends_a_roll(lab: Lab, tmp_path: Path) -> None:
    with lab(workers=1, log_level="info") as it:
        it.wait_ready()
        before = ask(it)
        (tmp_path / "loaded_app.py").write_text(THREAD + APP)
        it.send(signal.SIGHUP)
        it.wait_log("the roll ends and the old one goes on: preload: importing loaded_app:app leaves what")
        assert ask(it)["pid"] == before["pid"]
        assert it.stop() == 0


def test_a_pool_that_ends_before_a_fork_is_no_obstacle(lab: Lab) -> None:
    """OpenBLAS starts its threads with the import of numpy; its handler ends them when somebody forks."""
    text = (
        "import numpy, os\n"
        "a = numpy.ones((400, 400))\n"
        "a @ a\n"
        "print('THREADS', len(os.listdir('/proc/self/task')), flush=True)\n"
    )
    multiply = APP.replace("    facts = {", "    assert (a @ a)[0, 0] == 400\n    facts = {")
    with lab(text + multiply, workers=2) as it:
        it.wait_ready(2)
        assert len(ask_all(it, 2)) == 2
        assert it.stop() == 0


def test_a_lifespan_that_fails_ends_the_boot(lab: Lab) -> None:
    text = APP.replace("started_in.append(", "raise RuntimeError('no GPU' or ")
    with lab(text, workers=2, lifespan="on", log_level="info") as it:
        assert it.running.wait(20) == 3
    assert "no GPU" in it.lines("ERROR")[0]


def test_sigterm_for_all_processes(lab: Lab) -> None:
    """systemd sends it to the whole group; the template is the supervisor's to end."""
    with lab(workers=2, log_level="info") as it:
        it.wait_ready(2)
        os.killpg(it.pid, signal.SIGTERM)
        assert it.wait_code() == 0
    assert not it.lines("ERROR")


def test_sigterm_for_the_template(lab: Lab) -> None:
    """One for all processes must not end it before the supervisor does."""
    with lab(workers=1) as it:
        it.wait_ready()
        before = ask(it)
        os.kill(before["imported_by"], signal.SIGTERM)
        os.kill(before["pid"], signal.SIGKILL)
        it.wait_ready(2)
        assert ask(it)["imported_by"] == before["imported_by"]
        os.kill(ask(it)["pid"], signal.SIGTERM)  # a worker takes it as ever
        it.wait_ready(3)
        assert it.stop() == 0


def test_a_unix_socket(tmp_path: Path) -> None:
    """One that all slots share is passed like one that is a slot's own."""
    path = tmp_path / "socket"
    with Serving("raw_app:app", tmp_path / "log", ["--preload", "--workers", "2"], uds=path) as server:
        (first, *_) = server.worker_pids(1)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: server.output.count(" ready in ") == 3, 20, "a successor")
        with Load(server) as load:
            load.wait_answered(100)
            server.running.send_signal(signal.SIGHUP)
            wait_until(lambda: server.output.count("has left") == 2, 30, "a roll")
            load.wait_answered(100)
        assert load.failures == []
    assert not path.exists()


def test_when_the_supervisor_is_killed_all_go(lab: Lab) -> None:
    with lab(workers=2) as it:
        it.wait_ready(2)
        family = it.pids()
        assert len(family) == 3
        os.kill(it.pid, signal.SIGKILL)
        it.running.wait(10)
        wait_until(lambda: not any(map(alive, family)), 6, "workers and template gone")


def test_a_stop_while_the_import_takes_for_ever(lab: Lab) -> None:
    with lab("import time\ntime.sleep(600)", workers=2) as it:
        it.wait_log("template (pid")
        assert it.stop() == 0


def test_a_worker_that_boots_for_ever_is_stopped(lab: Lab) -> None:
    text = APP.replace("started_in.append(", "import time; time.sleep(600 + ")
    with lab(text, workers=2) as it:
        it.wait_log("started", 3)
        assert it.stop() == 0


def test_what_the_import_registers_for_the_end_runs_once(lab: Lab) -> None:
    text = "import atexit, os\natexit.register(lambda: print('CLEARED by', os.getpid(), flush=True))\n"
    with lab(text + APP, workers=2) as it:
        it.wait_ready(2)
        template = ask(it)["imported_by"]
        os.kill(ask(it)["pid"], signal.SIGTERM)
        it.wait_ready(3)
        assert not it.lines("CLEARED")
        assert it.stop() == 0
    assert it.lines("CLEARED") == [f"CLEARED by {template}"]


def test_no_process_keeps_what_is_anothers(lab: Lab) -> None:
    """The supervisor's ends of channels are the supervisor's alone, and a template has no listener."""
    with lab(workers=2) as it:
        it.wait_ready(2)
        former = ask(it)
        os.kill(former["imported_by"], signal.SIGKILL)
        it.wait_log("has imported the application", 2)  # one that is made beside workers
        os.kill(former["pid"], signal.SIGKILL)
        it.wait_ready(3)
        found = ask_all(it, 2)
        (template,) = it.pids() - {facts["pid"] for facts in found.values()}

        def sockets(pid: int) -> set[str]:
            names = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
            return {name for name in names if name.startswith("socket:")}

        assert len(sockets(template)) == 1
        for facts in found.values():
            assert not sockets(facts["pid"]) & sockets(template)
        begun = begin(it.port)  # no listener of a template's would be left to hold the port
        begun.close()
        assert it.stop() == 0


def test_a_slot_more_and_a_slot_less(lab: Lab) -> None:
    with lab(workers=1) as it:
        it.wait_ready()
        it.send(signal.SIGTTIN)
        it.wait_ready(2)
        assert len({facts["imported_by"] for facts in ask_all(it, 2).values()}) == 1
        it.send(signal.SIGTTOU)
        it.wait_log("has left")
        assert ask(it)["LEANSERVE_WORKER"] == "0"
        assert it.stop() == 0


@pytest.mark.parametrize(
    ("app", "settings", "message"),
    [
        (lambda: None, {}, "need the application by name"),
        ("a:b", {"start_method": "spawn"}, "preload needs start_method fork"),
        ("a:b", {"reload": True}, "preload and reload cannot stand together"),
    ],
)
def test_what_cannot_be(app: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check_early(app, Settings.build(preload=True, **settings))


def test_a_setting_that_cannot_be_told(tmp_path: Path) -> None:
    """The template has its own copy of the settings, but those of a worker come from the supervisor."""
    (tmp_path / "loaded_app.py").write_text(APP)
    code = (
        "from leanserve import Server\n"
        "Server('loaded_app:app', port=0, preload=True, ssl_context_factory=lambda: None).serve()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False
    )
    assert "SettingsError: preload needs names, not objects" in done.stderr
    assert done.returncode == 1


def test_orphans_of_the_application_are_none_of_ours(lab: Lab) -> None:
    """A supervisor that inherited them for good would keep them as zombies."""
    text = """
import os, time

def leave_orphan():
    reader, writer = os.pipe()
    if not os.fork():
        between = os.getpid()
        if not os.fork():
            while os.getppid() == between:
                time.sleep(0.01)
            os.write(writer, str(os.getppid()).encode())
            os._exit(0)
        os._exit(0)
    os.wait()
    return int(os.read(reader, 20))
"""
    with lab(text + APP.replace("    facts = {", "    facts = {'orphan': leave_orphan(),"), workers=1) as it:
        it.wait_ready()
        assert ask(it)["orphan"] not in {it.pid, ask(it)["pid"]}
        assert it.stop() == 0


@pytest.mark.parametrize("before", [0, 1])
def test_who_inherits_orphans_goes_on_with_that(before: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def inherits() -> int:
        found = ctypes.c_int(-1)
        assert libc.prctl(37, ctypes.byref(found), 0, 0, 0) == 0
        return found.value

    assert inherits() == 0
    libc.prctl(36, before, 0, 0, 0)
    try:
        with inheriting_orphans():
            assert inherits() == 1
        assert inherits() == before
    finally:
        libc.prctl(36, 0, 0, 0, 0)


MODEL = """
import numpy

weights = numpy.ones(1 << 27)  # 1 GiB, and every page of it is written
"""


def pss_bytes(pids: set[int]) -> int:
    """What these processes take in memory: a page that n of them share counts 1/n for each."""
    text = "".join(Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids)
    return sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))


def test_four_workers_over_a_gib_of_weights_share_it(lab: Lab) -> None:
    read = APP.replace("    facts = {", "    assert weights.sum() == 1 << 27\n    facts = {")
    with lab(MODEL + read, workers=4) as it:
        it.wait_log(" ready in ", 4, within_s=60)
        found = ask_all(it, 4)
        assert pss_bytes({it.pid, *it.pids()}) < 1.3 * (1 << 30)
        os.kill(found["2"]["pid"], signal.SIGKILL)
        it.wait_log(" ready in ", 5, within_s=60)
        wait_until(lambda: ask_all(it, 4)["2"]["pid"] != found["2"]["pid"], 20, "a successor")
        total = pss_bytes({it.pid, *it.pids()})
        print(f"supervisor, template and 4 workers over 1 GiB: {total >> 20} MiB PSS")
        assert total < 1.3 * (1 << 30)
        assert it.stop() == 0


def test_the_supervisor_stays_small(lab: Lab) -> None:
    """It imports neither the application nor what that needs."""
    with lab(MODEL.replace("27", "20") + APP, workers=2) as it:
        it.wait_ready(2)
        status = Path(f"/proc/{it.pid}/status").read_text()
        rss_kib = int(status.partition("VmRSS:")[2].split()[0])
        assert rss_kib < 40 << 10
        maps = Path(f"/proc/{it.pid}/maps").read_text()
        assert "numpy" not in maps
        assert "_ssl" not in maps
        assert it.stop() == 0


def test_rolls_under_load(tmp_path: Path) -> None:
    options = ["--preload", "--workers", "2"]
    with Serving("raw_app:app", tmp_path / "log", options) as server, Load(server) as load:
        for count in (1, 2, 3):
            load.wait_answered(100)
            server.running.send_signal(signal.SIGHUP)
            wait_until(lambda n=count: server.output.count("has left") >= 2 * n, 30, "a roll")
        load.wait_answered(100)
    assert load.failures == []
    assert load.refused == 0
