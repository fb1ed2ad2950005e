"""A supervisor in a process of its own, with stand-ins for its workers or with real ones."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from harness import alive, descendants, free_port, wait_until

_SCRIPT = """
import json, sys
from leanserve import logs
from leanserve.errors import SettingsError
from leanserve.settings import Settings
from leanserve.supervisor.supervisor import Supervisor
app, entry, flat = sys.argv[1:]
settings = Settings.build(**json.loads(flat))
logs.configure(settings.log)
try:
    code = Supervisor(app, settings, entry=entry).run(then_exit=True)
except SettingsError as error:
    sys.exit(f"settings: {error}")
sys.exit(code)
"""

# An application for real workers: what its worker is busy with is in the path.
APP = """
import asyncio, hashlib, os, signal, sys, time

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    if scope["type"] != "http":
        return
    path = scope["path"]
    if path == "/block":
        time.sleep(float(scope["query_string"] or 60))
    if path == "/stuck":  # in C code, without the GIL
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 60_000_000)
    if path.startswith("/wait"):
        await asyncio.sleep(float(scope["query_string"]))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": str(os.getpid()).encode()})

async def lifespan(receive, send):
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})
"""

SOON_S = 10.0
# Small, so that no test waits long; a test that is about one of them sets it.
_QUICK = {
    "drain_timeout": 5.0, "drain_idle_timeout": 0.0, "kill_grace": 0.5, "lifespan_shutdown_timeout": 1.0,
    "log_level": "debug", "access_log": False, "restart_backoff_max": 1.0,
}


@dataclass(frozen=True, slots=True)
class Note:
    """One line of the stand-ins' journal."""

    event: str
    pid: int
    slot: int
    generation: int
    lane: int


@dataclass
class Supervised:
    """A context manager: runs the supervisor, and kills what is left of its session at the end.

    Attributes:
        app: the stand-in's behaviour; with `entry` an application for that.
        folder: for the log, the journal, and as the place of the application.
    """

    app: str
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    entry: str = "stand_ins:main"
    prefix: tuple[str, ...] = ()
    port: int = 0
    pass_fds: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    begun_s: float = 0.0
    log_from: int = 0

    def __enter__(self) -> Supervised:
        self.port = self.port or free_port()
        flat = {"port": self.port, **_QUICK, **self.settings}
        path = [str(self.folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "LEANSERVE_TEST_JOURNAL": str(self.folder / "journal"),
        }
        self.begun_s = time.monotonic()
        with (self.folder / "log").open("ab") as log:
            self.log_from = log.tell()
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-c", _SCRIPT, self.app, self.entry, json.dumps(flat)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment,
                cwd=self.folder, pass_fds=self.pass_fds,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended, left = self.running.poll() is not None, self.members()
        # Its own session, made by us: the group holds this supervisor's processes and no others.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.running.wait(10)
        if error is not None:
            error.add_note(self.log)
        elif ended:
            assert not left, f"left behind: {left}\n{self.log}"

    @property
    def running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None
        return self.process

    @property
    def pid(self) -> int:
        """The supervisor."""
        return self.running.pid

    @property
    def log(self) -> str:
        """What supervisor and workers have logged."""
        return (self.folder / "log").read_bytes()[self.log_from :].decode("utf-8", "replace")

    def lines(self, word: str) -> list[str]:
        """The lines of the log with this in them."""
        return [line for line in self.log.splitlines() if word in line]

    def notes(self, event: str) -> list[Note]:
        """What the stand-ins did, in order."""
        try:
            text = (self.folder / "journal").read_text()
        except FileNotFoundError:
            return []
        rows = [line.split() for line in text.splitlines()]
        return [Note(row[0], *map(int, row[1:])) for row in rows if row[0] == event]

    def pids(self) -> set[int]:
        """The workers that live now."""
        return descendants(self.pid)

    def members(self) -> set[int]:
        """The processes of its session, wherever they hang in the tree; zombies are none."""
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(fields[3]) == self.pid and fields[0] != "Z":
                        found.add(int(entry.name))
        return found - {self.pid}

    def wait_log(self, word: str, count: int = 1, within_s: float = SOON_S) -> None:
        """Wait until so many lines with this word are in the log."""
        wait_until(lambda: len(self.lines(word)) >= count, within_s, f"{count} x {word!r} in\n{self.log}")

    def wait_notes(self, event: str, count: int, within_s: float = SOON_S) -> list[Note]:
        """Wait until stand-ins have done this so often."""
        wait_until(lambda: len(self.notes(event)) >= count, within_s, f"{count} x {event} in\n{self.log}")
        return self.notes(event)

    def wait_ready(self, count: int = 1) -> None:
        """Wait until the supervisor has heard `count` workers say that they are ready."""
        self.wait_log(" ready in ", count)

    def send(self, number: signal.Signals) -> None:
        """To the supervisor alone."""
        self.running.send_signal(number)

    def wait_code(self, within_s: float = SOON_S) -> int:
        """Wait for the end; assert that no process is left; the exit code."""
        family = self.pids()
        try:
            code = self.running.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {within_s} s") from None
        wait_until(lambda: not any(map(alive, family)), 3.0, f"children gone: {family}")
        assert "Traceback (most" not in self.log, self.log
        return code

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal, and wait for the end."""
        self.send(number)
        return self.wait_code()


def get(port: int, path: str = "/") -> bytes:
    """The body of a GET on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=15)
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    finally:
        connection.close()


def begin(port: int, path: str = "/") -> socket.socket:
    """Send a GET and do not wait for the answer."""
    sock = socket.create_connection(("127.0.0.1", port), 15)
    sock.sendall(f"GET {path} HTTP/1.1\r\nhost: a\r\n\r\n".encode())
    return sock
