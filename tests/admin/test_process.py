"""The admin process beside real workers: it answers when they cannot, comes back, and leaves with them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import Load, Serving, alive, descendants, free_port, wait_until
from supervised import APP, Supervised, begin

Lab = Callable[..., Supervised]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """`with lab(workers=2) as it:`; `app` is the source of the application."""

    def make(app: str = APP, **settings: Any) -> Supervised:
        (tmp_path / "served_app.py").write_text(textwrap.dedent(app))
        settings = {"admin": f"127.0.0.1:{free_port()}", **settings}
        return Supervised("served_app:app", tmp_path, settings, entry="leanserve.worker.process:main")

    return make


class OverUnix(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=15)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(address: str, path: str, method: str = "GET") -> tuple[int, str]:
    """Status and body."""
    if address.startswith("unix:"):
        connection: http.client.HTTPConnection = OverUnix(address.removeprefix("unix:"))
    else:
        connection = http.client.HTTPConnection(address, timeout=15)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def admin_of(it: Supervised) -> str:
    return str(it.settings["admin"])


def status_of(it: Supervised) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ask(admin_of(it), "/status")[1])
    return found


def admin_pid(it: Supervised, number: int = 1) -> int:
    """The pid of the process that was started as the `number`-th."""
    it.wait_log("admin process started", number)
    return int(it.lines("admin process started")[number - 1].rpartition("pid ")[2].rstrip(")"))


def descriptors(pid: int) -> set[str]:
    """What the descriptors of a process are; one may be closed while we look."""
    found = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(each))
    return found


HOLDS_THE_GIL = """
import re, time

async def app(scope, receive, send):
    if scope["type"] == "http":
        if scope["path"] == "/gil":
            re.match(r"(a+)+$", "a" * 60 + "b")  # for years, in C, and never lets go
        time.sleep(600)
"""


@pytest.mark.parametrize("path", ["/gil", "/sleep"])
def test_answers_while_every_worker_is_stuck(lab: Lab, path: str) -> None:
    with lab(HOLDS_THE_GIL, workers=2, lifespan="off") as it:
        it.wait_ready(2)
        stuck: list[socket.socket] = []

        def both_are_stuck() -> bool:
            ages = [worker["heartbeat_age_s"] for worker in status_of(it)["workers"]]
            if len(stuck) < 12 or time.monotonic() - it.begun_s > 6:
                stuck.append(begin(it.port, path))
            return min(ages) > 1.6  # a loop that moves beats every second

        wait_until(both_are_stuck, 20, "both loops stand still")
        for page in ("/livez", "/readyz", "/startupz", "/metrics", "/status"):
            assert ask(admin_of(it), page)[0] == 200
        # They were stuck before the questions and are so behind the answers: nobody else can have given them.
        assert min(worker["heartbeat_age_s"] for worker in status_of(it)["workers"]) > 1.6
        for sock in stuck:
            sock.close()
        assert it.stop(signal.SIGQUIT) == 0


def test_all_loops_stalled_turns_livez_red(lab: Lab) -> None:
    with lab(workers=1, max_stall=1.5) as it:
        it.wait_ready()
        assert ask(admin_of(it), "/livez")[0] == 200
        with begin(it.port, "/block?4"):
            wait_until(lambda: ask(admin_of(it), "/livez")[0] == 503, 10, "/livez is red")
            code, text = ask(admin_of(it), "/readyz")
            assert (code, "its loop stands still" in text) == (503, True)
        wait_until(lambda: ask(admin_of(it), "/livez")[0] == 200, 10, "/livez is well again")
        assert it.stop() == 0


def test_a_boot_that_takes_long_is_live_and_not_started(lab: Lab) -> None:
    with lab(workers=1, app="import time; time.sleep(1.5)\n" + APP) as it:
        admin_pid(it)
        assert ask(admin_of(it), "/livez")[0] == 200
        assert ask(admin_of(it), "/startupz")[0] == 503
        wait_until(lambda: "booting" in ask(admin_of(it), "/startupz")[1], 10, "it boots")
        assert ask(admin_of(it), "/readyz")[0] == 503
        wait_until(lambda: ask(admin_of(it), "/startupz")[0] == 200, 10, "it has started")
        assert ask(admin_of(it), "/readyz")[0] == 200
        assert it.stop() == 0


def test_a_killed_worker_is_seen_until_its_successor_is_ready(lab: Lab) -> None:
    with lab(workers=2, ready_workers=2, app="import time; time.sleep(1.0)\n" + APP) as it:
        it.wait_ready(2)
        assert ask(admin_of(it), "/readyz")[0] == 200
        victim = status_of(it)["workers"][0]
        os.kill(victim["pid"], signal.SIGKILL)
        wait_until(lambda: ask(admin_of(it), "/readyz")[0] == 503, 10, "/readyz is red")
        assert ask(admin_of(it), "/readyz")[1].startswith("not ready: 1 of 2 workers ready, 2 wanted")
        wait_until(lambda: ask(admin_of(it), "/readyz")[0] == 200, 10, "/readyz is well again")
        server = status_of(it)["server"]
        assert (server["crashes"], server["restarts"]) == (1, 1)
        metrics = ask(admin_of(it), "/metrics")[1].splitlines()
        assert {"leanserve_worker_crashes_total 1", "leanserve_worker_restarts_total 1"} <= set(metrics)
        assert it.stop() == 0


SAYS_NO = """
async def app(scope, receive, send):
    set_ready = scope["extensions"]["leanserve.worker"]["set_ready"]
    if scope["type"] == "lifespan":
        await receive()
        set_ready(False, "cold")
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
    else:
        set_ready(True)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
"""


def test_an_application_that_says_no_is_seen(lab: Lab) -> None:
    with lab(SAYS_NO, ready_path="/ready") as it:
        it.wait_ready()
        code, text = ask(admin_of(it), "/readyz")
        assert (code, "the application says that it is not ready" in text) == (503, True)
        assert ask(f"127.0.0.1:{it.port}", "/ready") == (503, "not ready: cold\n")
        assert ask(f"127.0.0.1:{it.port}", "/")[0] == 200
        assert ask(f"127.0.0.1:{it.port}", "/ready")[0] == 200
        assert ask(admin_of(it), "/readyz")[0] == 200
        assert it.stop() == 0


def test_a_drain_is_seen(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with lab(admin=f"unix:{path}") as it:
        it.wait_ready()
        assert path.stat().st_mode & 0o777 == 0o600
        with begin(it.port, "/wait?1.5"):
            wait_until(lambda: status_of(it)["in_flight"] == 1, 10, "a request runs")
            it.send(signal.SIGTERM)
            wait_until(lambda: ask(admin_of(it), "/readyz")[0] == 503, 10, "/readyz is red")
            assert ask(admin_of(it), "/readyz")[1].startswith("not ready: the server is stopping")
            assert ask(admin_of(it), "/livez")[0] == 200
            assert it.wait_code() == 0
        assert not path.exists()


def test_a_sigterm_to_the_whole_group_leaves_it_there(lab: Lab) -> None:
    with lab() as it:
        it.wait_ready()
        pid = admin_pid(it)
        with begin(it.port, "/wait?1.5"):
            wait_until(lambda: status_of(it)["in_flight"] == 1, 10, "a request runs")
            os.killpg(it.pid, signal.SIGTERM)  # as systemd does
            wait_until(lambda: ask(admin_of(it), "/readyz")[0] == 503, 10, "/readyz is red")
            assert alive(pid)
            assert it.wait_code() == 0
        assert len(it.lines("admin process")) == 1


def test_spawned_workers_have_it_too(lab: Lab, runtime_directory: Path) -> None:
    with lab(start_method="spawn") as it:
        it.wait_ready()
        assert ask(admin_of(it), "/readyz")[0] == 200
        assert order(it, runtime_directory, "dump")[0] == 200
        it.wait_log("most recent call first")
        assert it.stop() == 0


def test_a_killed_admin_process_comes_back_and_costs_no_request(serve: Callable[..., Serving]) -> None:
    address = f"127.0.0.1:{free_port()}"
    server = serve("raw_app:app", "--workers", "2", "--admin", address, "--log-level", "debug")
    workers = server.worker_pids(2)
    (first,) = descendants(server.pid) - workers
    with Load(server) as load:
        load.wait_answered(50)
        os.kill(first, signal.SIGKILL)
        # Who comes in between waits in the queue of the socket, which the supervisor holds.
        assert ask(address, "/readyz")[0] == 200
        load.wait_answered(50)
    assert load.failures == []
    assert load.refused == 0
    (second,) = descendants(server.pid) - workers
    assert second != first
    assert re.search(rf"the admin process \(pid {first}\) died: signal SIGKILL", server.output)


def test_an_admin_process_that_dies_again_and_again_ends_nobody_else(lab: Lab) -> None:
    with lab(restart_limit=2, restart_backoff_max=0.2) as it:
        it.wait_ready()
        for number in range(1, 6):
            os.kill(admin_pid(it, number), signal.SIGKILL)
        admin_pid(it, 6)
        assert ask(admin_of(it), "/readyz")[0] == 200
        assert it.stop() == 0


def test_it_dies_with_the_supervisor(lab: Lab) -> None:
    with lab() as it:
        it.wait_ready()
        pid = admin_pid(it)
        it.running.kill()
        wait_until(lambda: not alive(pid), 5, "the admin process is gone")
        wait_until(lambda: not it.members(), 5, "and all others")


def test_a_port_that_is_taken_is_told_at_once(lab: Lab) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with lab(admin=f"127.0.0.1:{taken.getsockname()[1]}") as it:
            it.running.wait(10)
        assert it.running.returncode != 0
    assert "the port is taken by another process" in it.log
    assert not it.lines("starting")


def test_no_worker_holds_the_port(lab: Lab) -> None:
    """A copy in a worker that lingers would keep the next server from binding it."""
    with lab(workers=2) as it:
        it.wait_ready(2)
        pid, port = admin_pid(it), int(admin_of(it).rpartition(":")[2])
        os.kill(status_of(it)["workers"][0]["pid"], signal.SIGKILL)
        it.wait_ready(3)
        rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        (inode,) = (row[9] for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A")

        assert f"socket:[{inode}]" in descriptors(pid)
        for worker in status_of(it)["workers"]:
            assert f"socket:[{inode}]" not in descriptors(worker["pid"])
        # And the admin process holds nothing of the workers.
        served = {row[9] for row in rows if row[1].endswith(f":{it.port:04X}") and row[3] == "0A"}
        assert len(served) == 2
        assert not {f"socket:[{number}]" for number in served} & descriptors(pid)
        assert it.stop() == 0


def test_what_is_at_work(lab: Lab) -> None:
    """One worker says it; the other holds its loop, and that is said, too."""
    with lab(workers=2) as it:
        it.wait_ready(2)
        waiting = [begin(it.port, "/wait/50?50") for _ in range(25)]

        def flights() -> list[int]:
            return [worker["in_flight"] for worker in status_of(it)["workers"]]

        wait_until(lambda: sum(flights()) == 25, 10, "all are at work")
        with begin(it.port, "/block?30"):
            wait_until(lambda: sum(flights()) == 26, 10, "one is stuck")
            wait_until(
                lambda: [each["running"] for each in running_of(it)].count(None) == 1, 10, "one does not say"
            )
            (listed,) = [each["running"] for each in running_of(it) if each["running"] is not None]
        (free,) = [each["worker"] for each in running_of(it) if each["running"] is not None]
        assert len(listed) == min(flights()[free - 1], 20)
        assert {each["what"] for each in listed} == {"GET '/wait/50'"}
        assert all(each["age_s"] > 0 for each in listed)
        assert [each["age_s"] for each in listed] == sorted((each["age_s"] for each in listed), reverse=True)
        for sock in waiting:
            sock.close()
        assert it.stop(signal.SIGQUIT) == 0


def running_of(it: Supervised) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(ask(admin_of(it), "/running")[1])["workers"]
    return found


# The control socket


def test_without_admin_the_first_who_asks_starts_it(lab: Lab, runtime_directory: Path) -> None:
    with lab(admin=None, workers=2) as it:
        it.wait_ready(2)
        assert len(it.pids()) == 2
        path = runtime_directory / f"{it.pid}.sock"
        assert path.stat().st_mode & 0o777 == 0o600
        assert ask(f"unix:{path}", "/readyz")[0] == 200
        assert len(it.pids()) == 3
        os.kill(admin_pid(it), signal.SIGKILL)
        it.wait_log("died: signal SIGKILL")
        assert len(it.pids()) == 2
        assert ask(f"unix:{path}", "/livez")[0] == 200
        assert it.stop() == 0
        assert not path.exists()


def test_a_control_socket_that_cannot_be_is_no_reason_not_to_start(lab: Lab, tmp_path: Path) -> None:
    with lab(admin=None, control_socket=str(tmp_path / "no" / "such" / "place")) as it:
        it.wait_ready()
        assert len(it.lines("WARNING")) == 1
        assert "no control socket: cannot listen on" in it.log
        assert it.stop() == 0


def test_none_is_none(lab: Lab, runtime_directory: Path) -> None:
    with lab(admin=None, control_socket=None) as it:
        it.wait_ready()
        assert not (runtime_directory / f"{it.pid}.sock").exists()
        assert it.stop() == 0


# Orders


def order(it: Supervised, path: Path, words: str) -> tuple[int, dict[str, Any]]:
    code, text = ask(f"unix:{path / f'{it.pid}.sock'}", f"/orders/{words}", "POST")
    return code, json.loads(text)


def test_more_and_fewer_workers(lab: Lab, runtime_directory: Path) -> None:
    with lab(workers=1) as it:
        it.wait_ready()
        for number in (3, 3, 1, 1):
            assert order(it, runtime_directory, f"workers?number={number}")[0] == 200
            wait_until(lambda number=number: len(status_of(it)["workers"]) == number, 10, f"{number} workers")
            assert status_of(it)["server"]["workers"] == number
        assert len(it.lines("adding worker")) == 2
        for number in (0, 257):
            code, said = order(it, runtime_directory, f"workers?number={number}")
            assert (code, said["text"][:32]) == (409, "workers: a number from 1 to 256,")
        said = order(it, runtime_directory, "nosuch")[1]
        assert said == {"ok": False, "text": "there is no order 'nosuch'"}
        assert it.stop() == 0


def test_reload_replaces_all(lab: Lab, runtime_directory: Path) -> None:
    with lab(workers=2) as it:
        it.wait_ready(2)
        before = {worker["pid"] for worker in status_of(it)["workers"]}
        assert order(it, runtime_directory, "reload")[0] == 200
        wait_until(lambda: not before & {each["pid"] for each in status_of(it)["workers"]}, 15, "all are new")
        assert status_of(it)["server"]["restarts"] == 2
        assert it.stop() == 0


def test_drain_twice_is_drain_once(lab: Lab, runtime_directory: Path) -> None:
    with lab() as it:
        it.wait_ready()
        with begin(it.port, "/wait?1.5") as running:
            wait_until(lambda: status_of(it)["in_flight"] == 1, 10, "a request runs")
            for _ in range(3):  # a second SIGTERM would hurry, and cut the request
                assert order(it, runtime_directory, "drain")[0] == 200
            code, said = order(it, runtime_directory, "reload")
            assert (code, said["text"]) == (409, "the server is stopping")
            assert running.recv(65536).startswith(b"HTTP/1.1 200")
        assert it.wait_code() == 0
        assert not it.lines("stopping at once")


def test_hurry_waits_for_nothing(lab: Lab, runtime_directory: Path) -> None:
    with lab(drain_timeout=60.0) as it:
        it.wait_ready()
        with begin(it.port, "/wait?50"):
            wait_until(lambda: status_of(it)["in_flight"] == 1, 10, "a request runs")
            assert order(it, runtime_directory, "hurry")[0] == 200
            assert it.wait_code() == 0


def test_dump_writes_the_stack_of_a_worker_that_is_stuck(lab: Lab, runtime_directory: Path) -> None:
    with lab(HOLDS_THE_GIL, workers=2, lifespan="off") as it:
        it.wait_ready(2)
        with begin(it.port, "/gil"):
            wait_until(lambda: status_of(it)["in_flight"] == 1, 10, "a request runs")
            (slot,) = (worker["worker"] for worker in status_of(it)["workers"] if worker["in_flight"])
            code, said = order(it, runtime_directory, f"dump?number={slot}")
            assert (code, said["text"]) == (200, f"stacks of worker {slot} go to the log (stderr)")
            wait_until(lambda: re.search(r'File ".*served_app.py", line 7 in app', it.log), 10, "its stack")
            assert order(it, runtime_directory, "dump?number=9")[0] == 409
            assert order(it, runtime_directory, "dump")[0] == 200
            wait_until(lambda: len(it.lines("in app")) >= 2, 10, "both stacks")
        assert len(it.pids()) == 3  # a signal that ends nobody
        assert it.stop(signal.SIGQUIT) == 0


# Others that are told of deaths


def test_prometheus_client_is_told_of_the_dead(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gauges"
    folder.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    with lab(admin=None, workers=2) as it:
        it.wait_ready(2)
        pid = admin_pid(it)  # at once: somebody has to tell
        victim, other = sorted(it.pids() - {pid})
        for name in (f"gauge_livesum_{victim}.db", f"gauge_livesum_{other}.db", f"counter_{victim}.db"):
            (folder / name).touch()
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: not (folder / f"gauge_livesum_{victim}.db").exists(), 10, "its gauge is gone")
        left = {path.name for path in folder.iterdir()}
        assert left == {f"gauge_livesum_{other}.db", f"counter_{victim}.db"}
        assert it.stop() == 0


def test_prometheus_client_is_told_of_dead_templates(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gauge that is set by the import would count for ever."""
    folder = tmp_path / "gauges"
    folder.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    with lab(admin=None, preload=True) as it:
        it.wait_ready()
        (pid,) = (int(each) for each in re.findall(r"template \(pid (\d+)\) has imported", it.log))
        gauge = folder / f"gauge_livesum_{pid}.db"
        gauge.touch()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not gauge.exists(), 10, "its gauge is gone")
        assert it.stop() == 0
