"""The supervisor itself is replaced, with real processes, real signals, and clients that notice nothing."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import Certificates, Load, Serving, alive, descendants, fetch, free_port, wait_until
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
    server = start("--workers", "2")
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
    server.wait_output("to take over from supervisor pid")
    server.signal(signal.SIGUSR2)
    server.wait_output("no upgrade: one is under way already")
    server.signal(signal.SIGTTIN)
    server.wait_output("the number of workers stays")
    (new,) = descendants(server.pid) - set(server.worker_pids(1)) - _workers_of(server, "to take over")
    os.kill(new, signal.SIGUSR2)
    server.wait_output("no upgrade: this supervisor has not taken over|no upgrade: not while")


def _workers_of(server: Upgradable, _word: str) -> set[int]:
    """The workers of a new supervisor that has not taken over: grandchildren of the old one."""
    import re

    (new,) = re.findall(r"\[(\d+)\] INFO upgrade: to take over", server.output)
    return descendants(int(new))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
@pytest.mark.parametrize("group", [False, True])
def test_a_stop_meanwhile_stops_both(start: Start, tmp_path: Path, number: signal.Signals, group: bool) -> None:
    server = start("--workers", "2")
    write_app(tmp_path, "2", "await asyncio.sleep(600)")
    server.signal(signal.SIGUSR2)
    server.wait_output("to take over from supervisor pid")
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
    marker = tmp_path / "go"
    wait = f"while not os.path.exists({str(marker)!r}): await asyncio.sleep(0.02)"
    write_app(tmp_path, "2", wait)
    server.signal(signal.SIGUSR2)
    server.wait_output("to take over from supervisor pid")
    server.signal(signal.SIGHUP)
    server.wait_output("workers are replaced when it is over")
    wait_until(lambda: _has_workers(server), 20, "the new worker has read its code")
    write_app(tmp_path, "3")
    marker.touch()
    wait_until(lambda: ask(server, "/version") == "3", 20, f"the third version\n{server.output}")
    assert server.supervisor != server.pid


def _has_workers(server: Upgradable) -> bool:
    found = _workers_of(server, "")
    return any(Path(f"/proc/{pid}/stat").exists() for pid in found) and time.sleep(1.0) is None


def test_a_reload_meanwhile_when_the_upgrade_fails(start: Start, tmp_path: Path) -> None:
    server = start()
    write_app(tmp_path, "2", "await asyncio.sleep(600)")
    server.signal(signal.SIGUSR2)
    server.wait_output("to take over from supervisor pid")
    server.signal(signal.SIGHUP)
    server.wait_output("workers are replaced when it is over")
    write_app(tmp_path, "3")
    for pid in descendants(server.pid):
        if "upgrade" not in server.output.split(f"[{pid}]")[0][-1:] and f"[{pid}] INFO upgrade" in server.output:
            os.kill(pid, signal.SIGTERM)
    server.wait_output("upgrade failed")
    wait_until(lambda: ask(server, "/version") == "3", 20, f"the third version\n{server.output}")
    assert server.supervisor == server.pid


@pytest.mark.parametrize("who", ["old", "new"])
def test_kill_9_of_one_of_the_two(start: Start, tmp_path: Path, who: str) -> None:
    """Whoever is left goes on, and the listeners have not stopped to listen for a moment."""
    server = start("--workers", "2")
    marker = tmp_path / "go"
    write_app(tmp_path, "2", f"while not os.path.exists({str(marker)!r}): await asyncio.sleep(0.02)")
    server.signal(signal.SIGUSR2)
    server.wait_output("to take over from supervisor pid")
    (new,) = {int(line.split("[")[1].split("]")[0]) for line in server.output.splitlines() if "to take" in line}
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


def test_another_python_and_another_directory_at_the_same_path(start: Start, tmp_path: Path) -> None:
    """What a deployment by links does: the link changes, and the path of the command stays."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_app(tmp_path / name, {"one": "1", "two": "2"}[name])
    (tmp_path / "current").symlink_to("one")
    (tmp_path / "env").write_text("ASKED=first\n")
    os.chdir(tmp_path)  # its own PWD is below
    port = free_port()
    server = start(
        line=["-m", "leanserve", "up_app:app", "--port", str(port), "--env-file", str(tmp_path / "env")],
        port=port, environment={"PWD": str(tmp_path / "current")},
    )
    assert server.upgrade()
    assert ask(server, "/env") == "first"
