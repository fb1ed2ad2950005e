"""The supervisor itself is replaced, with real processes, real signals, and clients that notice nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import Certificates, Load, Serving, alive, descendants, fetch, free_port, wait_until
from leanserve.admin.client import Client, find_server
from leanserve.errors import LeanserveError
from leanserve.rendezvous import control_path
from supervised import Supervised
from upgraded import Upgradable

Start = Callable[..., Upgradable]

APP = """
import asyncio, os

VERSION = "{version}"

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        {startup}
        await send({{"type": "lifespan.startup.complete"}})
        await receive()
        await send({{"type": "lifespan.shutdown.complete"}})
    elif scope["type"] == "http":
        path = scope["path"]
        if path == "/wait":
            await asyncio.sleep(float(scope["query_string"]))
        body = {{"/version": VERSION, "/parent": str(os.getppid()), "/env": os.environ.get("ASKED", "")}}
        text = body.get(path, str(os.getpid())).encode()
        headers = [(b"content-length", b"%d" % len(text))]
        await send({{"type": "http.response.start", "status": 200, "headers": headers}})
        await send({{"type": "http.response.body", "body": text}})
"""


def write_app(folder: Path, version: str = "1", startup: str = "pass") -> None:
    """Another size each time, so that no compiled file of before counts as this one."""
    text = APP.format(version=version, startup=startup)
    (folder / "up_app.py").write_text(text + f"# {'.' * int(version)}\n")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start("--workers", "2")`: it serves `up_app.py` of `tmp_path`."""
    started: list[Upgradable] = []
    write_app(tmp_path)

    def begin(*options: str, **facts: Any) -> Upgradable:
        it = Upgradable("up_app:app", tmp_path / "log", options, folder=tmp_path, **facts)
        it.environment = {"PYTHONDONTWRITEBYTECODE": "1", **it.environment}
        started.append(it)
        it.__enter__()
        it.wait_output("listening on")  # its supervisor knows, too
        return it

    yield begin
    for it in started:
        kind, error, trace = sys.exc_info()
        it.__exit__(kind, error, trace)


def ask(server: Serving, path: str) -> str:
    return fetch(server, path).body.decode()


def assert_nothing_lost(*loads: Load) -> None:
    for load in loads:
        assert load.failures == []
        assert load.refused == 0
        assert load.total > 100


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_upgrades_back_to_back_lose_nothing(start: Start, tmp_path: Path, loop: str) -> None:
    server = start("--workers", "2", "--loop", loop)
    with Load(server, threads=3) as kept, Load(server, threads=3, requests_per_connection=1) as single:
        supervisors = {server.pid}
        for version in range(2, 6):
            write_app(tmp_path, str(version))
            supervisors.add(server.upgrade())
            kept.wait_answered(50)
            single.wait_answered(50)
            assert ask(server, "/version") == str(version)
            assert ask(server, "/parent") == str(server.supervisor)
    assert_nothing_lost(kept, single)
    assert len(supervisors) == 5
    assert server.members() == {server.supervisor, *descendants(server.supervisor)}


@pytest.mark.parametrize("kind", ["unix", "fd", "tls", "shared"])
def test_kinds_of_listeners(start: Start, tmp_path: Path, kind: str, certificates: Certificates) -> None:
    facts: dict[str, Any] = {}
    options = ["--workers", "2"]
    with socket.socket() as lent:
        if kind == "unix":
            facts["uds"] = tmp_path / "s"
        elif kind == "fd":
            lent.bind(("127.0.0.1", 0))
            lent.listen(2048)
            facts["listener"] = lent
        elif kind == "tls":
            facts["certificates"] = certificates
        else:
            options += ["--accept", "shared"]
        server = start(*options, **facts)
        inode = (tmp_path / "s").stat().st_ino if kind == "unix" else 0
        with Load(server, threads=3) as kept, Load(server, threads=2, requests_per_connection=1) as single:
            for _ in range(2):
                server.upgrade()
                kept.wait_answered(50)
                single.wait_answered(20)
        assert_nothing_lost(kept, single)
        if kind == "unix":
            assert (tmp_path / "s").stat().st_ino == inode
        server.end()
        assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_another_number_of_workers(start: Start, tmp_path: Path, before: int, after: int) -> None:
    config = tmp_path / "leanserve.toml"
    config.write_text(f"workers = {before}\n")
    server = start("--config", str(config))
    server.worker_pids(before)
    with Load(server, threads=3) as kept, Load(server, threads=3, requests_per_connection=1) as single:
        config.write_text(f"workers = {after}\n")
        server.upgrade()
        assert len(server.worker_pids(after)) == after
        kept.wait_answered(50)
        single.wait_answered(50)
    assert_nothing_lost(kept, single)
    assert len(descendants(server.supervisor)) == after


def test_a_request_that_takes_long_is_finished_by_the_old_one(start: Start) -> None:
    server = start()
    with server.connect() as connection:
        connection.sendall(b"GET /wait?2 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        (old,) = server.worker_pids(1)
        wait_until(lambda: server.upgrade() != server.pid, 20, "a new supervisor")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert not alive(old)


@pytest.mark.parametrize(
    ("startup", "said"),
    [("raise ValueError('no such model')", "no such model"), ("os._exit(7)", "exit code 7")],
)
def test_a_failed_upgrade_leaves_the_old_one(start: Start, tmp_path: Path, startup: str, said: str) -> None:
    server = start("--workers", "2", "--lifespan", "on")
    with Load(server, threads=3) as kept, Load(server, threads=2, requests_per_connection=1) as single:
        write_app(tmp_path, "2", startup)
        server.signal(signal.SIGUSR2)
        server.wait_output(r"upgrade failed, supervisor pid \d+ goes on: .*" + said)
        assert ask(server, "/version") == "1"
        (tmp_path / "up_app.py").write_text("this is no Python\n")
        server.signal(signal.SIGUSR2)
        server.wait_output("upgrade failed", 2)
        kept.wait_answered(50)
        write_app(tmp_path, "3")  # and the next one can be right
        server.upgrade()
        assert ask(server, "/version") == "3"
        single.wait_answered(50)
    assert_nothing_lost(kept, single)


def test_settings_that_cannot_be_used(start: Start, tmp_path: Path) -> None:
    config = tmp_path / "leanserve.toml"
    config.write_text("")
    server = start("--config", str(config))
    config.write_text("nosuch = 1\n")
    server.signal(signal.SIGUSR2)
    server.wait_output(r"upgrade failed, supervisor pid \d+ goes on: exit code 2; what it wrote says why")
    config.write_text(f"bind = ['127.0.0.1:{free_port()}']\n")
    server.signal(signal.SIGUSR2)
    server.wait_output(r"upgrade failed, .* an upgrade keeps the addresses .*restart instead \(exit code 2\)")
    assert ask(server, "/version") == "1"


def test_a_second_one_is_refused_meanwhile(start: Start, tmp_path: Path) -> None:
    server = start()
    write_app(tmp_path, "2", "await asyncio.sleep(600)")
    server.signal(signal.SIGUSR2)
    new = server.newcomer
    server.signal(signal.SIGUSR2)
    server.wait_output("no upgrade: one is under way already")
    for pid, said in ((server.pid, 1), (new, 2)):
        os.kill(pid, signal.SIGTTIN)
        server.wait_output("the number of workers stays", said)
    os.kill(new, signal.SIGUSR2)
    server.wait_output("no upgrade: no worker has been ready yet")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
@pytest.mark.parametrize("group", [False, True])
def test_a_stop_meanwhile_stops_both(
    start: Start, tmp_path: Path, number: signal.Signals, group: bool
) -> None:
    server = start("--workers", "2")
    write_app(tmp_path, "2", "await asyncio.sleep(600)")
    server.signal(signal.SIGUSR2)
    assert server.newcomer
    (os.killpg if group else os.kill)(server.pid, number)
    server.wait_left(server.pid)
    wait_until(lambda: not server.members(), 10, "the end of all")
    assert "Traceback" not in server.output


def test_a_stop_before_the_new_one_hears(start: Start, tmp_path: Path) -> None:
    server = start()
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(600)\n")
    server.signal(signal.SIGUSR2)
    server.wait_output("upgrade: started supervisor pid")
    server.end()


def test_a_reload_meanwhile_is_done_by_who_serves_then(start: Start, tmp_path: Path) -> None:
    server = start()
    marker, begun = tmp_path / "go", tmp_path / "begun"
    write_app(tmp_path, "2", f"open({str(begun)!r}, 'w').close(); {_wait_for(marker)}")
    server.signal(signal.SIGUSR2)
    assert server.newcomer
    server.signal(signal.SIGHUP)
    server.wait_output("workers are replaced when it is over")
    wait_until(begun.exists, 20, "the new worker has read its code")
    write_app(tmp_path, "3")
    marker.touch()
    wait_until(lambda: ask(server, "/version") == "3", 20, f"the third version\n{server.output}")
    assert server.supervisor != server.pid


def test_a_reload_meanwhile_whose_import_takes_longer_than_the_upgrade(start: Start, tmp_path: Path) -> None:
    server = start("--preload")
    marker, begun = tmp_path / "go", tmp_path / "begun"
    write_app(tmp_path, "2", f"open({str(begun)!r}, 'w').close(); {_wait_for(marker)}")
    server.signal(signal.SIGUSR2)
    assert server.newcomer
    wait_until(begun.exists, 20, "the new worker has read its code")
    write_app(tmp_path, "3")
    code = (tmp_path / "up_app.py").read_text()
    (tmp_path / "up_app.py").write_text(f"import time\ntime.sleep(4)\n{code}")
    server.signal(signal.SIGHUP)
    time.sleep(0.5)  # it is heard; nothing else would tell
    marker.touch()
    wait_until(lambda: ask(server, "/version") == "3", 30, f"the third version\n{server.output}")
    assert server.supervisor != server.pid


def _wait_for(marker: Path) -> str:
    """A startup that waits until a file is there; one line."""
    return f"[await asyncio.sleep(0.02) for _ in iter(lambda: os.path.exists({str(marker)!r}), True)]"


def test_a_reload_meanwhile_when_the_upgrade_fails(start: Start, tmp_path: Path) -> None:
    server = start()
    write_app(tmp_path, "2", "await asyncio.sleep(600)")
    server.signal(signal.SIGUSR2)
    new = server.newcomer
    server.signal(signal.SIGHUP)
    server.wait_output("workers are replaced when it is over")
    write_app(tmp_path, "3")
    os.kill(new, signal.SIGTERM)
    server.wait_output("upgrade failed")
    wait_until(lambda: ask(server, "/version") == "3", 20, f"the third version\n{server.output}")
    assert server.supervisor == server.pid


@pytest.mark.parametrize("who", ["old", "new"])
def test_kill_9_of_one_of_the_two(start: Start, tmp_path: Path, who: str) -> None:
    """Whoever is left goes on, and the listeners have not stopped to listen for a moment."""
    server = start("--workers", "2")
    marker = tmp_path / "go"
    write_app(tmp_path, "2", _wait_for(marker))
    server.signal(signal.SIGUSR2)
    new = server.newcomer
    wait_until(lambda: len(descendants(new)) == 2, 20, "its workers")
    with Load(server, threads=2, requests_per_connection=1) as single:
        single.wait_answered(20)
        os.kill(server.pid if who == "old" else new, signal.SIGKILL)
        if who == "old":
            server.running.wait(5)
            time.sleep(0.5)  # nobody accepts; the kernel queues
            marker.touch()
            server.wait_output("upgrade: taken over from")
        else:
            server.wait_output("upgrade failed, .* goes on: signal SIGKILL")
        single.wait_answered(100, 30)
    assert single.refused == 0
    assert ask(server, "/version") == ("2" if who == "old" else "1")
    if who == "old":
        server.upgrade()  # it is a supervisor as good as any


_TWO_ARE_READY = """for place in range(9):
            try:
                os.mkdir("{folder}/" + str(place))
                break
            except FileExistsError:
                pass
        if place >= 2:
            await asyncio.sleep(600)"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_new_one_that_ends_while_some_of_its_workers_serve(
    start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    """They have accepted, and leave without a word to the listeners, which are those of the old workers."""
    config = tmp_path / "leanserve.toml"
    config.write_text("workers = 2\n")
    server = start("--config", str(config))
    server.worker_pids(2)
    write_app(tmp_path, "2", _TWO_ARE_READY.format(folder=tmp_path))
    config.write_text("workers = 3\n")
    with Load(server, threads=3) as kept, Load(server, threads=3, requests_per_connection=1) as single:
        server.signal(signal.SIGUSR2)
        new = server.newcomer
        server.wait_output(rf"\[{new}\] INFO worker .* ready in", 2)
        single.wait_answered(50)
        os.kill(new, number)
        server.wait_output("upgrade failed")
        single.wait_answered(100)
        kept.wait_answered(100)
    assert (kept.refused, single.refused) == (0, 0)
    lost = len(kept.failures) + len(single.failures)
    assert lost == 0 or number == signal.SIGKILL  # what ran in killed workers is cut after their half second
    assert len(server.worker_pids(2)) == 2


def test_a_program_is_executed_again(start: Start, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    text = "from leanserve import Server\nimport up_app, os, sys\n"
    text += "assert sys.argv[1:] == ['an argument']\n"
    text += "Server(up_app.app, port=int(os.environ['ITS_PORT']), access_log=False).serve(workers=2)\n"
    program.write_text(text)
    port = free_port()
    server = start(
        line=[str(program), "an argument"], port=port, environment={"ITS_PORT": str(port), "ASKED": "this"}
    )
    with Load(server, threads=3) as load:
        write_app(tmp_path, "2")
        server.upgrade()
        load.wait_answered(50)
    assert_nothing_lost(load)
    assert (ask(server, "/version"), ask(server, "/env")) == ("2", "this")


def test_a_link_that_points_elsewhere_now(start: Start, tmp_path: Path) -> None:
    """What a deployment does: `current` is another release, with its own Python and environment file."""
    for name, version in (("one", "1"), ("two", "2")):
        (tmp_path / name).mkdir()
        write_app(tmp_path / name, version)
        (tmp_path / name / "python").symlink_to(sys.executable)
    current, env, port = tmp_path / "current", tmp_path / "env", free_port()
    current.symlink_to("one")
    env.write_text("ASKED=first\n")
    server = start(
        line=["-m", "leanserve", "up_app:app", "--port", str(port), "--env-file", str(env)], port=port,
        environment={"PWD": str(current), "PYTHONPATH": os.pathsep.join(sys.path)}, directory=current,
        python=current / "python",
    )
    assert ask(server, "/version") == "1"
    current.unlink()
    current.symlink_to("two")
    env.write_text("ASKED=second\n")
    server.upgrade()
    assert (ask(server, "/version"), ask(server, "/env")) == ("2", "second")
    assert os.readlink(f"/proc/{server.supervisor}/cwd") == str(tmp_path / "two")


def ctl(*arguments: str) -> tuple[int, str]:
    """Run the command as an operator does; its exit code and all that it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "leanserve", "ctl", *arguments], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


class Asking:
    """Asks for the status all the time, on a connection each; notes every answer and every failure."""

    def __init__(self, ask: Callable[[], object]) -> None:
        self.answers: list[object] = []
        self.failures: list[str] = []
        self._ask = ask
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(20)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(self._ask())
            except (OSError, LeanserveError) as error:
                self.failures.append(repr(error))
            self._stop.wait(0.005)


@pytest.mark.parametrize("admin", ["auto", "path", "tcp"])
def test_orders_and_status_go_over(start: Start, tmp_path: Path, admin: str) -> None:
    """Whoever asks has an answer all the time; and there is one server at any time, and never two."""
    options, port = ["--workers", "2"], free_port()
    if admin == "path":
        options += ["--control-socket", str(tmp_path / "c")]
    elif admin == "tcp":
        options += ["--admin", f"127.0.0.1:{port}"]
    server = start(*options)
    where = ["--socket", str(tmp_path / "c")] if admin == "path" else []

    def status() -> object:
        if admin == "tcp":
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10) as response:
                return response.status
        path = str(tmp_path / "c") if admin == "path" else find_server(None, None)
        return Client(path).status()["server"]["pid"]

    supervisors = [server.pid]
    with Asking(status) as asking:
        wait_until(lambda: asking.answers, 20, "a status")
        for _ in range(3):
            code, said = ctl("upgrade", "--wait", *where)
            assert (code, said) == (0, f"supervisor pid {supervisors[-1]} is replaced\n")
            supervisors.append(server.supervisor)
            server.wait_left(supervisors[-2])  # and is no zombie, which would look alive to `ctl`
        seen = len(asking.answers)
        wait_until(lambda: len(asking.answers) > seen + 5, 20, "more of them")
    assert asking.failures == []
    if admin == "tcp":
        assert set(asking.answers) == {200}
    else:
        assert set(asking.answers) == set(supervisors)
        assert ctl("status", *where)[0] == 0
    (tmp_path / "up_app.py").write_text("no Python\n")
    assert ctl("upgrade", "--wait", *where) == (
        1, "the old supervisor goes on: the new one failed, as the log says\n",
    )  # fmt: skip
    code, said = ctl("upgrade", *where)
    assert (code, said.startswith("started supervisor pid")) == (0, True)
    server.wait_output("upgrade failed", 2)
    sockets = [tmp_path / "c", Path(control_path(server.supervisor))]
    server.end()
    assert not any(path.exists() for path in sockets)


def test_pid_1_cannot_be_replaced(tmp_path: Path) -> None:
    """Its end is the end of its container."""
    namespace = ("unshare", "-p", "-f", "--mount-proc", "--kill-child")
    with Supervised("obey", tmp_path, {}, prefix=namespace) as it:
        it.wait_ready()
        (first,) = (pid for pid in it.pids() if _parent_of(pid) == it.pid)
        os.kill(first, signal.SIGUSR2)
        it.wait_log("no upgrade: the supervisor is PID 1")
        os.kill(first, signal.SIGTERM)
        assert it.wait_code() == 0


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


_IMPATIENT = """
import sys
from leanserve import logs
from leanserve.settings import Settings
from leanserve.supervisor.supervisor import Supervisor
settings = Settings.build(port=int(sys.argv[1]), workers=2)
logs.configure(settings.log)
supervisor = Supervisor("up_app:app", settings)
supervisor.upgrade.budget_s = 1.0
sys.exit(supervisor.run(then_exit=True))
"""


def test_one_that_is_not_ready_in_time(start: Start, tmp_path: Path) -> None:
    port = free_port()
    server = start(
        line=["-c", _IMPATIENT, str(port)], port=port,
        environment={"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    write_app(tmp_path, "2", "await asyncio.sleep(600)")
    server.signal(signal.SIGUSR2)
    server.wait_output("upgrade failed, .* goes on: its workers were not ready within 1 s")
    assert ask(server, "/version") == "1"


@pytest.mark.parametrize("busy", [False, True])
def test_the_port_of_a_killed_supervisor_is_free_soon(start: Start, tmp_path: Path, busy: bool) -> None:
    """SIGKILL leaves no time to say good-bye, and a new server binds within the time its workers have."""
    server = start("--workers", "2")
    with server.connect() as kept:
        kept.sendall(b"GET /pid HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert kept.recv(65536)
        if busy:
            kept.sendall(b"GET /wait?600 HTTP/1.1\r\nhost: localhost\r\n\r\n")
        server.running.kill()
        server.running.wait(5)
        for _ in range(400):  # as a manager does that restarts it
            again = Upgradable("up_app:app", tmp_path / "again", folder=tmp_path, port=server.port)
            again.start()
            again.wait_output("listening on|the port is taken by another process")
            if "listening on" in again.output:  # an orphan may still answer, so that tells nothing
                break
            again.kill()
        assert "listening on" in again.output
        again.end()
        again.kill()
    wait_until(lambda: not server.members(), 10, "the orphans leave")
