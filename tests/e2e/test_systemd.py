"""What systemd says and hears: a manager that obeys NotifyAccess=main, and systemd's own programs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from docs.documents import blocks, read
from harness import Load, descendants, fetch, free_port, wait_until
from upgraded import Upgradable

APP = """
import os
async def app(scope, receive, send):
    if scope["type"] == "http":
        names = [name for name in os.environ if name.startswith(("NOTIFY", "LISTEN", "WATCH", "LEANSERVE_U"))]
        path, texts = scope["path"], {"/names": " ".join(names), "/family": repr(scope["client"])}
        text = texts.get(path, str(os.getpid()))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": text.encode()})
"""
# As a manager does it: the pid in the variables is that of the process that becomes the server.
AS_MEANT = ["/bin/sh", "-c", 'export LISTEN_PID=$$ WATCHDOG_PID=$$; exec "$@"', "sh"]


class Manager:
    """Believes the main process alone, as NotifyAccess=main does, and follows MAINPID=.

    Attributes:
        told: what the main process has said, without signs of life.
        beats: how many of those came.
        ignored: what others have said.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.main = 0
        self.told: list[str] = []
        self.beats = 0
        self.ignored: list[str] = []
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.sock.bind(str(path))
        self.sock.setblocking(False)

    def look(self) -> None:
        """Take what has come."""
        while True:
            try:
                data, ancillary, _, _ = self.sock.recvmsg(65536, socket.CMSG_SPACE(12))
            except BlockingIOError:
                return
            pid = struct.unpack("iii", ancillary[0][2])[0]
            for line in data.decode().split("\n"):
                if pid != self.main:
                    self.ignored.append(line)
                elif line == "WATCHDOG=1":
                    self.beats += 1
                else:
                    self.told.append(line)
                if pid == self.main and line.startswith("MAINPID="):
                    self.main = int(line.partition("=")[2])

    def wait(self, line: str, count: int = 1) -> None:
        """Wait until the main process has said this so often."""

        def enough() -> bool:
            self.look()
            return self.told.count(line) >= count

        try:
            wait_until(enough, 20, line)
        except AssertionError:
            raise AssertionError(f"{line} is not among {self.told}; ignored: {self.ignored}") from None


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    it = Manager(tmp_path / "n")
    yield it
    it.sock.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Upgradable]]:
    """`start("--workers", "2", prefix=[...])`: a server that has answered."""
    (tmp_path / "sd_app.py").write_text(APP)
    with ExitStack() as stack:

        def begin(*options: str, prefix: list[str], wait: bool = True, **facts: Any) -> Upgradable:
            line = ["-m", "leanserve", "sd_app:app", "--app-dir", str(tmp_path), "--no-access-log", *options]
            it = Upgradable("", tmp_path / "log", line=line, prefix=prefix, **facts)
            it.start()
            stack.push(it)
            if wait:
                it.wait_ready()
            return it

        yield begin


def test_a_life_as_systemd_sees_it(start: Callable[..., Upgradable], manager: Manager) -> None:
    environment = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "400000"}
    port = free_port()
    server = start(
        "--port", str(port), "--workers", "2", prefix=AS_MEANT, port=port, wait=False, environment=environment
    )
    manager.main = server.pid
    manager.wait("READY=1")
    assert fetch(server, "/").status == 200  # that it is ready is true
    manager.wait("STATUS=running, 2 of 2 workers ready")
    assert "EXTEND_TIMEOUT_USEC=60000000" in manager.told[: manager.told.index("READY=1")]
    assert fetch(server, "/names").body == b""  # workers speak to no manager

    server.signal(signal.SIGHUP)
    manager.wait("RELOADING=1")
    manager.wait("READY=1", 2)
    assert manager.told[manager.told.index("RELOADING=1") + 1].startswith("MONOTONIC_USEC=")

    for count in (3, 4):
        new = server.upgrade()
        manager.wait("READY=1", count)
        assert manager.main == new
        assert fetch(server, "/names").body == b""
    assert manager.ignored == []
    assert "STOPPING=1" not in manager.told  # the service has not stopped

    beats = manager.beats
    wait_until(lambda: manager.look() or manager.beats > beats + 2, 20, "signs of life of the new one")
    os.kill(server.supervisor, signal.SIGSTOP)
    time.sleep(0.5)
    manager.look()
    beats = manager.beats
    time.sleep(1.0)
    manager.look()
    assert manager.beats == beats  # a supervisor that does not run says nothing
    os.kill(server.supervisor, signal.SIGCONT)

    for worker in descendants(server.supervisor):
        os.kill(worker, signal.SIGSTOP)  # but not because of its workers: the good ones would die as well
    wait_until(lambda: manager.look() or manager.beats > beats + 2, 20, "signs of life beside stuck workers")
    for worker in descendants(server.supervisor):
        os.kill(worker, signal.SIGCONT)
    server.end()
    manager.look()
    assert manager.told.count("STOPPING=1") == 1


def test_a_failed_upgrade_tells_the_manager_nothing(
    start: Callable[..., Upgradable], manager: Manager, tmp_path: Path
) -> None:
    port = free_port()
    server = start(
        "--port", str(port), prefix=AS_MEANT, port=port, wait=False,
        environment={"NOTIFY_SOCKET": str(manager.path)},
    )
    manager.main = server.pid
    manager.wait("READY=1")
    (tmp_path / "sd_app.py").write_text("no Python\n")
    server.signal(signal.SIGUSR2)
    server.wait_output("upgrade failed")
    manager.look()
    assert (manager.ignored, manager.main) == ([], server.pid)
    assert not [line for line in manager.told if line.startswith(("MAINPID", "STOPPING"))]


ACTIVATE = shutil.which("systemd-socket-activate")
needs_systemd = pytest.mark.skipif(ACTIVATE is None, reason="no systemd-socket-activate (Debian: systemd)")


def activated(*listen: str, names: str = "") -> list[str]:
    """What has systemd's own program open the sockets; it starts the server at the first connect."""
    keep = [name for name in os.environ if name.startswith(("XDG_", "PYTHON", "COV", "VIRTUAL"))]
    found = [str(ACTIVATE), *(f"--setenv={name}" for name in (*keep, "PYTHONUNBUFFERED"))]
    found += [f"--fdname={names}"] if names else []
    return found + [f"--listen={address}" for address in listen]


@needs_systemd
def test_activated_sockets(start: Callable[..., Upgradable], tmp_path: Path) -> None:
    """All that were passed, of two families; through upgrades; and neither closed nor removed by us."""
    port, path = free_port(), tmp_path / "u"
    server = start("--workers", "2", prefix=activated(f"127.0.0.1:{port}", str(path)), port=port)
    local = Upgradable("", tmp_path / "x", uds=path)
    assert fetch(local, "/family").body == b"None"
    assert fetch(server, "/family").body.startswith(b"('127.0.0.1', ")
    assert fetch(server, "/names").body == b""
    inode = path.stat().st_ino
    with Load(server, threads=2) as load, Load(local, threads=2, requests_per_connection=1) as local_load:
        for _ in range(2):
            server.upgrade()
            load.wait_answered(50)
            local_load.wait_answered(50)
    assert (load.failures, local_load.failures, load.refused, local_load.refused) == ([], [], 0, 0)
    server.end()
    assert path.stat().st_ino == inode


@needs_systemd
def test_an_activated_socket_by_its_name(start: Callable[..., Upgradable], tmp_path: Path) -> None:
    port, other = free_port(), free_port()
    prefix = activated(f"127.0.0.1:{other}", f"127.0.0.1:{port}", names="other:web")
    server = start("--bind", "systemd:web", prefix=prefix, port=port)
    server.wait_output(f"listening on http://127.0.0.1:{port}")
    assert f"listening on http://127.0.0.1:{other}" not in server.output


ANALYZE = shutil.which("systemd-analyze")


@pytest.mark.skipif(ANALYZE is None, reason="no systemd-analyze (Debian: systemd)")
@pytest.mark.parametrize("broken", [False, True])
def test_the_unit_files_of_the_guide(tmp_path: Path, broken: bool) -> None:
    """systemd itself reads them; that it can say no is shown by a line that is wrong."""
    found = {block.kind: block.text for block in blocks(read("howto/systemd.md"))}
    names = [kind.partition(" ")[2] for kind in found if kind.startswith("systemd ")]
    assert sorted(names) == ["sentiment.service", "sentiment.socket"]
    for name in names:
        text = found[f"systemd {name}"].replace("/srv/sentiment/current/.venv/bin/python", sys.executable)
        (tmp_path / name).write_text(text.replace("mixed", "nosuch") if broken else text)
    done = subprocess.run(
        [str(ANALYZE), "verify", "--man=no", *(str(tmp_path / name) for name in names)],
        capture_output=True, text=True, timeout=60, env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
    )  # fmt: skip
    ours = [line for line in done.stderr.splitlines() if "sentiment" in line]
    assert bool(ours) is broken, done.stderr


def test_descriptor_0(start: Callable[..., Upgradable]) -> None:
    """StandardInput=socket, as inetd: 0 is a descriptor as good as any, also for the next supervisor."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        program = "import os, sys; os.dup2(int(sys.argv[1]), 0); os.execv(sys.argv[2], sys.argv[2:])"
        prefix = [sys.executable, "-c", program, str(sock.fileno())]
        server = start("--fd", "0", prefix=prefix, port=sock.getsockname()[1], listener=sock)
        assert fetch(server, "/names").status == 200
        server.upgrade()
        assert fetch(server, "/names").status == 200
