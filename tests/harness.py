"""Real server processes, real certificates and a real load: what the end-to-end tests stand on.

Everything is on loopback, and every process that is started here is stopped here, by its own pid.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import trustme

APPS = Path(__file__).parent / "e2e" / "apps"
READY_WITHIN_S = 30.0
STOP_WITHIN_S = 20.0


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files of a certificate authority made for one test run."""

    authority: Path
    certificate: Path
    key: Path

    @classmethod
    def make(cls, folder: Path) -> Certificates:
        """A certificate for localhost, 127.0.0.1 and ::1, and its authority, written to `folder`."""
        authority = trustme.CA()
        server = authority.issue_cert("localhost", "127.0.0.1", "::1")
        authority.cert_pem.write_to_path(folder / "authority.pem")
        server.private_key_pem.write_to_path(folder / "key.pem")
        for number, blob in enumerate(server.cert_chain_pems):
            blob.write_to_path(folder / "certificate.pem", append=number > 0)
        return cls(folder / "authority.pem", folder / "certificate.pem", folder / "key.pem")

    def options(self) -> list[str]:
        """The server's command line for them."""
        return ["--ssl-certfile", str(self.certificate), "--ssl-keyfile", str(self.key)]

    def client_context(self) -> ssl.SSLContext:
        """A client's context that trusts them and nobody else."""
        return ssl.create_default_context(cafile=str(self.authority))


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], object], within_s: float, what: str) -> None:
    """Look until the condition is true; AssertionError with `what` when the time is over."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"not within {within_s} s: {what}"
        time.sleep(0.02)


def descendants(pid: int) -> set[int]:
    """The pids of all processes below one, from /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents[int(entry.name)] = int(fields[1])
    found: set[int] = set()
    level = {pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level} - found
        found |= level
    return found


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class Serving:
    """One `python -m leanserve`, from start to its clean end; a context manager.

    Attributes:
        app: the APP argument ("" runs the built-in demo).
        options: further arguments, as typed.
        log: file that takes its output.
        host: where to listen when neither `uds` nor `fd` is set.
        certificates: serves TLS with them.
        uds: path of a unix socket to serve on.
        listener: a listening socket to hand over by descriptor.
        directory: where it is started.
    """

    app: str
    log: Path
    options: Sequence[str] = ()
    host: str = "127.0.0.1"
    certificates: Certificates | None = None
    uds: Path | None = None
    listener: socket.socket | None = None
    environment: dict[str, str] = field(default_factory=dict)
    directory: Path | None = None
    exit_code: int | None = 0
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """The start command."""
        line = [sys.executable, "-m", "leanserve", *([self.app] if self.app else [])]
        line += ["--app-dir", str(APPS), "--no-access-log", *self.options]
        if self.listener is not None:
            self.port = self.listener.getsockname()[1]
            line += ["--fd", str(self.listener.fileno())]
        elif self.uds is not None:
            line += ["--uds", str(self.uds)]
        else:
            self.port = self.port or free_port(self.host)
            line += ["--host", self.host, "--port", str(self.port)]
        return line + (self.certificates.options() if self.certificates else [])

    def __enter__(self) -> Serving:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        elif self.running.poll() is None:
            self.stop()

    def start(self) -> None:
        """Start the process; does not wait."""
        descriptors = [self.listener.fileno()] if self.listener else []
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                pass_fds=descriptors, start_new_session=True, cwd=self.directory,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
            )

    @property
    def running(self) -> subprocess.Popen[bytes]:
        """The process."""
        assert self.process is not None
        return self.process

    @property
    def pid(self) -> int:
        """The pid of the process that was started: the supervisor."""
        return self.running.pid

    @property
    def output(self) -> str:
        """What it has printed until now."""
        return self.log.read_text("utf-8", "replace")

    @property
    def base_url(self) -> str:
        """http(s)://host:port; for a unix socket any host does."""
        scheme = "https" if self.certificates else "http"
        if self.uds is not None:
            return f"{scheme}://localhost"
        return f"{scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def connect(self, timeout_s: float = 10.0, *, own_port: bool = False) -> socket.socket:
        """A new connection, TLS where the server has it.

        Args:
            timeout_s: for the connection, and then for each read and write.
            own_port: nobody else gets this local port while the socket is open. (One that the kernel chose at
                connect is free again as soon as a reset arrives.)
        """
        if self.uds is not None:
            plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            plain.settimeout(timeout_s)
            try:
                plain.connect(str(self.uds))
            except OSError:
                plain.close()
                raise
        else:
            plain = self._connect_tcp(timeout_s, own_port)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.certificates is None:
            return plain
        try:
            return self.certificates.client_context().wrap_socket(plain, server_hostname="localhost")
        except OSError:
            plain.close()
            raise

    def _connect_tcp(self, timeout_s: float, own_port: bool) -> socket.socket:
        address = (self.host, self.port)
        if not own_port:
            return socket.create_connection(address, timeout_s)
        while True:
            try:
                return socket.create_connection(address, timeout_s, (self.host, free_port(self.host)))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:  # somebody was quicker
                    raise

    def wait_ready(self) -> None:
        """Wait for the first answer. AssertionError, with the output, when there is none."""

        def answers() -> bool:
            assert self.running.poll() is None, f"exit code {self.running.returncode}\n{self.output}"
            try:
                with self.connect() as connection:
                    connection.sendall(b"GET /pid HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
                    return connection.recv(12).startswith(b"HTTP/1.1")
            except OSError:
                return False

        try:
            wait_until(answers, READY_WITHIN_S, "an answer of the server")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output}") from None

    def worker_pids(self, count: int, within_s: float = 15.0) -> set[int]:
        """The pids of `count` different workers, as they answer `GET /pid`."""
        seen: set[int] = set()

        def enough() -> bool:
            seen.add(int(fetch(self, "/pid").body))
            return len(seen) >= count

        wait_until(enough, within_s, f"{count} workers answering, saw {seen}\n{self.output}")
        return seen

    def stop(self, number: signal.Signals = signal.SIGTERM, within_s: float = STOP_WITHIN_S) -> None:
        """Signal the supervisor; assert that it ends with the expected code and leaves no process behind."""
        self.running.send_signal(number)
        self.wait_stopped(within_s)

    def wait_stopped(self, within_s: float = STOP_WITHIN_S) -> None:
        """Wait for the end; assert the exit code, no traceback and no process left."""
        family = descendants(self.pid)
        try:
            code = self.running.wait(within_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running {within_s} s after the signal\n{self.output}") from None
        try:
            wait_until(lambda: not any(map(alive, family)), 3.0, f"children of {self.pid} gone")
        finally:
            self._kill_group()
        if self.exit_code is not None:
            assert code == self.exit_code, f"exit code {code}\n{self.output}"
            assert "Traceback" not in self.output, self.output

    def kill(self) -> None:
        """End it at once, with what is left of its process group."""
        if self.process is not None:
            self._kill_group()
            self.process.wait(10)

    def _kill_group(self) -> None:
        # Its own session, made by us: the group holds this server's processes and no others.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def last(self) -> bool:
        """Whether the server closes behind it."""
        return self.headers.get("connection", "").lower() == "close"


class AnswerReader:
    """Responses off a socket, one after the other; small on purpose and strict."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""

    def _more(self) -> bool:
        data = self._connection.recv(65536)
        self._buffer += data
        return bool(data)

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._buffer:
            if not self._more():
                raise ConnectionError(f"closed within {self._buffer[:100]!r}")
        taken, _, self._buffer = self._buffer.partition(mark)
        return taken

    def _exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            if not self._more():
                raise ConnectionError("closed within a body")
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def read(self, method: str = "GET") -> Answer | None:
        """The next final response, or None at the end of the stream. ConnectionError for half of one."""
        if not self._buffer and not self._more():
            return None
        while True:
            line, *lines = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
            version, status = line.split(" ", 2)[:2]
            assert version == "HTTP/1.1", line
            if not status.startswith("1"):
                break
        headers = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in lines)}
        return Answer(int(status), headers, self._body(method, int(status), headers))

    def _body(self, method: str, status: int, headers: dict[str, str]) -> bytes:
        if method == "HEAD" or status in (204, 304):
            return b""
        if "chunked" in headers.get("transfer-encoding", ""):
            whole = b""
            while size := int(self._until(b"\r\n"), 16):
                whole += self._exactly(size)
                assert self._exactly(2) == b"\r\n"
            assert self._until(b"\r\n") == b""
            return whole
        if "content-length" in headers:
            return self._exactly(int(headers["content-length"]))
        while self._more():
            pass
        taken, self._buffer = self._buffer, b""
        return taken


def fetch(server: Serving, path: str, method: str = "GET", body: bytes = b"") -> Answer:
    """One request on a connection of its own."""
    with server.connect() as connection:
        connection.sendall(
            b"%s %s HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s"
            % (method.encode(), path.encode(), len(body), body)
        )
        answer = AnswerReader(connection).read(method)
    assert answer is not None
    return answer


class Load:
    """Keep-alive GETs from a few threads until the end of the block; counts what became of each.

    A refused connection is no failed request; `refused_ends` makes it the end of the thread.
    """

    def __init__(
        self, server: Serving, path: str = "/pid", *, threads: int = 4, requests_per_connection: int = 20,
        refused_ends: bool = False,
    ) -> None:
        self.answered: Counter[int] = Counter()
        self.failures: list[str] = []
        self.refused = 0
        self._server = server
        self._request = f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
        self._per_connection = requests_per_connection
        self._refused_ends = refused_ends
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]

    @property
    def total(self) -> int:
        """Requests answered with 200."""
        return sum(self.answered.values())

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()

    def wait_answered(self, more: int, within_s: float = 15.0) -> None:
        """Wait until so many more requests have been answered."""
        goal = self.total + more
        wait_until(lambda: self.total >= goal, within_s, f"{more} more answers; failures {self.failures[:3]}")

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                connection = self._server.connect()
            except (ConnectionRefusedError, FileNotFoundError):
                self.refused += 1
                if self._refused_ends:
                    return
                self._stop.wait(0.01)
                continue
            except OSError as error:
                self.failures.append(f"connect: {error!r}")
                self._stop.wait(0.01)
                continue
            with connection:
                self._use(connection)

    def _use(self, connection: socket.socket) -> None:
        reader = AnswerReader(connection)
        for number in range(self._per_connection):
            if self._stop.is_set():
                return
            try:
                connection.sendall(self._request)
                answer = reader.read()
            except OSError as error:
                self.failures.append(f"request {number}: {error!r}")
                return
            if answer is None or answer.status != 200:
                self.failures.append(f"request {number}: {answer}")
                return
            self.answered[int(answer.body)] += 1
            if answer.last:
                return
            self._stop.wait(0.002)


@contextlib.contextmanager
def listening_socket() -> Iterator[socket.socket]:
    """A plain listening socket as a parent such as systemd hands it over: inheritable, no option set."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        listener.set_inheritable(True)
        yield listener
