"""How each server is started.

uvloop, no access log, idle connections kept for 75 s and as many connections as come, where that can be set;
otherwise the defaults.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "leanserve"

_READY_WITHIN_S = 30.0
_STOP_WITHIN_S = 0.3


@dataclass(frozen=True, slots=True)
class Peer:
    """A server and its command line.

    Attributes:
        command: tool and arguments, with {app}, {port} and {workers} to fill in.
        tls: further arguments for TLS, with {certificate} and {key}.
        packages: what has to be installed, and whose versions are reported.
        environment: variables beside our own.
    """

    command: list[str]
    tls: list[str]
    packages: list[str]
    environment: dict[str, str] = field(default_factory=dict)


_LEANSERVE = Peer(
    [
        "leanserve", "{app}", "--port", "{port}", "--workers", "{workers}", "--loop", "uvloop",
        "--no-access-log", "--log-level", "error",
    ],
    ["--ssl-certfile", "{certificate}", "--ssl-keyfile", "{key}"],
    ["leanserve", "h11", "wsproto"],
)


def _uvicorn(http: str, ws: str, *packages: str) -> Peer:
    return Peer(
        [
            "uvicorn", "{app}", "--port", "{port}", "--workers", "{workers}", "--loop", "uvloop",
            "--http", http, "--ws", ws, "--timeout-keep-alive", "75", "--no-access-log",
            "--log-level", "error",
        ],
        ["--ssl-certfile", "{certificate}", "--ssl-keyfile", "{key}"],
        ["uvicorn", *packages],
    )


PEERS: dict[str, Peer] = {
    REFERENCE: _LEANSERVE,
    # The folder holds a module numpy that cannot be imported.
    "leanserve-no-numpy": Peer(
        _LEANSERVE.command, _LEANSERVE.tls, _LEANSERVE.packages,
        {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks" / "without_numpy")])},
    ),
    "uvicorn-httptools": _uvicorn("httptools", "none", "httptools"),
    "uvicorn-h11": _uvicorn("h11", "none", "h11"),
    "uvicorn-sansio": _uvicorn("httptools", "websockets-sansio", "httptools", "websockets"),
    "uvicorn-wsproto": _uvicorn("httptools", "wsproto", "httptools", "wsproto"),
    "granian": Peer(
        [
            "granian", "{app}", "--interface", "asgi", "--port", "{port}", "--workers", "{workers}",
            "--loop", "uvloop", "--backpressure", "20000", "--no-access-log", "--log-level", "error",
        ],
        ["--ssl-certificate", "{certificate}", "--ssl-keyfile", "{key}"],
        ["granian"],
    ),
    "gunicorn-asgi": Peer(
        [
            "gunicorn", "--worker-class", "asgi", "--asgi-loop", "uvloop", "--bind", "127.0.0.1:{port}",
            "--workers", "{workers}", "--keep-alive", "75", "--worker-connections", "20000",
            "--no-control-socket", "--log-level", "error", "{app}",
        ],
        ["--certfile", "{certificate}", "--keyfile", "{key}"],
        ["gunicorn"],
    ),
    "hypercorn": Peer(
        [
            "hypercorn", "{app}", "--bind", "127.0.0.1:{port}", "--workers", "{workers}",
            "--worker-class", "uvloop", "--keep-alive", "75", "--log-level", "error",
        ],
        ["--certfile", "{certificate}", "--keyfile", "{key}"],
        ["hypercorn"],
    ),
}


def missing(name: str) -> list[str]:
    """What has to be installed before this peer can be measured."""
    wanted = ["uvloop", *PEERS[name].packages]
    absent = []
    for package in wanted:
        try:
            version(package)
        except PackageNotFoundError:
            absent.append(package)
    return absent


@dataclass(frozen=True, slots=True)
class Setup:
    """How a server is started for a workload.

    Attributes:
        app: the application.
        workers: worker processes.
        tls: (certificate, key), or no TLS.
        port: on loopback; 0: one that is free.
        arguments: behind all others.
        environment: variables beside the peer's.
        descriptors: ours that it inherits.
    """

    app: str = "benchmarks.app:app"
    workers: int = 1
    tls: tuple[Path, Path] | None = None
    port: int = 0
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    descriptors: tuple[int, ...] = ()


def command(name: str, port: int, setup: Setup) -> list[str]:
    """The whole command line, the tool as a path."""
    peer = PEERS[name]
    parts = [*peer.command, *peer.tls] if setup.tls else peer.command
    certificate, key = setup.tls or ("", "")
    tool, *arguments = [
        part.format(app=setup.app, port=port, workers=setup.workers, certificate=certificate, key=key)
        for part in parts
    ]
    return [str(Path(sys.executable).parent / tool), *arguments, *setup.arguments]


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def accepts(port: int) -> bool:
    """Whether a connection is accepted now."""
    try:
        with socket.create_connection(("127.0.0.1", port), 1):
            return True
    except OSError:
        return False


def answers(port: int) -> bool:
    """Whether a GET is answered with 200; False at once when nobody listens."""
    try:
        with socket.create_connection(("127.0.0.1", port), _READY_WITHIN_S) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return connection.recv(65536).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class Running:
    """A started server.

    Attributes:
        begun_s: time.perf_counter() just before it was started.
    """

    name: str
    process: subprocess.Popen[bytes]
    port: int
    begun_s: float

    @property
    def pid(self) -> int:
        """The root of its process tree, and its process group."""
        return self.process.pid

    def wait(self, ready: Callable[[int], bool]) -> None:
        """Until `ready(port)`. RuntimeError when it ends before, or takes too long."""
        end = time.monotonic() + _READY_WITHIN_S
        while not ready(self.port):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.name} does not serve (exit code {self.process.returncode})")
            time.sleep(0.002)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for what is left of its process group."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            pass  # the kill below reaches it too
        # Its own session, made here: the group is this server and nobody else.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()


def _environment() -> dict[str, str]:
    """Ours, without what would change a server's settings, or keep the one that is run from its source tree
    from being compiled once, as the installed ones are."""
    foreign = (
        "LEANSERVE_", "UVICORN_", "GRANIAN_", "GUNICORN_", "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS",
        "PYTHONDONTWRITEBYTECODE", "MALLOC_",
    )
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


@contextlib.contextmanager
def started(name: str, setup: Setup) -> Iterator[Running]:
    """Run one server for the length of the block; it may not be ready yet."""
    port = setup.port or free_port()
    begun_s = time.perf_counter()
    process = subprocess.Popen(
        command(name, port, setup), cwd=ROOT, start_new_session=True,
        env={**_environment(), "PYTHONPATH": str(ROOT), **PEERS[name].environment, **setup.environment},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        pass_fds=setup.descriptors,
    )
    running = Running(name, process, port, begun_s)
    try:
        yield running
    finally:
        running.stop()
