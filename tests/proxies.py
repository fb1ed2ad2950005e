"""nginx and haproxy as reverse proxies in front of servers on loopback, and a load through them."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import pytest

from harness import Answer, AnswerReader, free_port, wait_until

# What a proxy says when a server took a request and did not answer it. A refused connect is not among them:
# there a proxy asks the next server.
LOST = re.compile(
    r"prematurely closed|reset by peer|broken pipe|upstream sent|no live upstreams|timed out", re.IGNORECASE
)

# proxy_next_upstream: nginx sends a POST again only where it has not been sent, or with non_idempotent.
NGINX_AGAIN = {"none": "off", "unsent": "error", "unanswered": "error non_idempotent"}


@dataclass(frozen=True, slots=True)
class Forwarded:
    """One line of a proxy's access log.

    Attributes:
        port: the client's.
        id: what the proxy put into ``x-request-id``.
        sent: whether a server answered it, or was asked at least.
    """

    port: int
    id: str
    method: str
    target: str
    sent: bool


@dataclass
class Proxy:
    """A proxy process with its configuration in `folder`; a context manager.

    Attributes:
        servers: ports of the servers behind it.
        lanes: how many pools of server connections it keeps: ``/N/...`` uses pool N, all else pool 0.
        pool: idle connections that one pool keeps to one server.
        again: which requests it may send a second time, though they may change something: "none", those that
            were "unsent" (no connection; to another server), or those that were "unanswered", too (the
            connection was closed before the first byte of an answer).
    """

    PROGRAM: ClassVar[str]
    STOP: ClassVar[signal.Signals] = signal.SIGTERM

    folder: Path
    servers: Sequence[int]
    lanes: int = 1
    pool: int = 1
    again: str = "none"
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Proxy:
        self.folder.mkdir(parents=True, exist_ok=True)
        program = find(self.PROGRAM)
        (self.folder / "configuration").write_text(self.configuration())
        with (self.folder / "output").open("wb") as output:
            self.process = subprocess.Popen(
                [program, *self.arguments()], stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, cwd=self.folder,
            )
        try:
            wait_until(self.answers, 10, f"{self.PROGRAM} answers")
        except AssertionError as error:
            self._kill()
            raise AssertionError(f"{error}\n{self.complaints()}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process is not None
        self.process.send_signal(self.STOP)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self._kill()

    def _kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def answers(self) -> bool:
        """Whether a GET gets a 200."""
        assert self.process is not None
        assert self.process.poll() is None, f"{self.PROGRAM}: exit code {self.process.returncode}"
        try:
            with connect(self.port) as connection:
                connection.sendall(b"GET /ready HTTP/1.1\r\nhost: a.example\r\nconnection: close\r\n\r\n")
                return connection.recv(12).startswith(b"HTTP/1.1 200")
        except OSError:
            return False

    def configuration(self) -> str:
        """The text of the configuration file."""
        raise NotImplementedError

    def arguments(self) -> list[str]:
        """The command line behind the program's name."""
        raise NotImplementedError

    def complaints(self) -> str:
        """What it has to complain of."""
        raise NotImplementedError

    def forwarded(self) -> list[Forwarded]:
        """Its access log."""
        raise NotImplementedError

    def lost(self) -> list[str]:
        """The complaints about requests that a server took and did not answer."""
        return [line for line in self.complaints().splitlines() if LOST.search(line)]


def find(program: str) -> str:
    """The path of a program of the distribution; skips the test, with the reason, where there is none."""
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin")
    if path is None:
        pytest.skip(f"no {program} on this machine (Debian: apt-get install {program})")
    return path


@dataclass
class Nginx(Proxy):
    """nginx, in one process.

    Attributes:
        streams_bodies: forward a request body as it comes and not when it is complete.
        websocket: forward ``Upgrade``, as nginx documents it.
    """

    PROGRAM: ClassVar[str] = "nginx"
    streams_bodies: bool = False
    websocket: bool = False

    def arguments(self) -> list[str]:
        return ["-p", str(self.folder), "-c", "configuration", "-e", "errors"]

    def configuration(self) -> str:
        pools = "\n".join(self._pool(lane) for lane in range(self.lanes))
        locations = "\n".join(
            f"    location /{lane}/ {{ proxy_pass http://lane{lane}; }}" for lane in range(self.lanes)
        )
        connection = "$asked" if self.websocket else '""'
        upgrade = "proxy_set_header Upgrade $http_upgrade;" if self.websocket else ""
        return f"""
daemon off; master_process off; pid pid; error_log errors info;
events {{ worker_connections 2048; }}
http {{
  log_format facts escape=json
    '{{"port":$remote_port,"id":"$request_id","method":"$request_method","target":"$request_uri",'
    '"upstream":"$upstream_addr"}}';
  access_log access facts;
  client_body_temp_path bodies; proxy_temp_path answers; fastcgi_temp_path f; uwsgi_temp_path u;
  scgi_temp_path s;
  keepalive_requests 1000000; client_header_timeout 2s; client_body_timeout 2s; lingering_timeout 1s;
  map $http_upgrade $asked {{ default upgrade; "" ""; }}
{pools}
  server {{
    listen 127.0.0.1:{self.port};
    proxy_http_version 1.1;
    proxy_set_header Connection {connection};
    {upgrade}
    proxy_set_header X-Request-Id $request_id;
    proxy_next_upstream {NGINX_AGAIN[self.again]};
    proxy_request_buffering {"off" if self.streams_bodies else "on"};
    location / {{ proxy_pass http://lane0; }}
{locations}
  }}
}}
"""

    def _pool(self, lane: int) -> str:
        servers = " ".join(f"server 127.0.0.1:{port} max_fails=0;" for port in self.servers)
        return f"  upstream lane{lane} {{ {servers} keepalive {self.pool}; keepalive_requests 1000000; }}"

    def complaints(self) -> str:
        return "\n".join((self.folder / name).read_text("latin-1") for name in ("errors", "output"))

    def forwarded(self) -> list[Forwarded]:
        lines = map(json.loads, (self.folder / "access").read_text("latin-1").splitlines())
        return [
            Forwarded(line["port"], line["id"], line["method"], line["target"], bool(line["upstream"]))
            for line in lines
        ]


@dataclass
class Haproxy(Proxy):
    """haproxy, in one process."""

    PROGRAM: ClassVar[str] = "haproxy"

    def arguments(self) -> list[str]:
        return ["-db", "-f", "configuration"]

    def configuration(self) -> str:
        backends = "\n".join(self._backend(lane) for lane in range(self.lanes))
        choices = "\n".join(
            f"  use_backend lane{lane} if {{ path_beg /{lane}/ }}" for lane in range(self.lanes)
        )
        return f"""
global
  maxconn 2000
  nbthread 1
  tune.http.logurilen 16384
defaults
  mode http
  timeout connect 5s
  timeout client 10s
  timeout server 10s
  timeout http-request 2s
  timeout http-keep-alive 10s
  retries {3 if self.again != "none" else 0}
  retry-on conn-failure {"empty-response" if self.again == "unanswered" else ""}
  {"option redispatch 1" if len(self.servers) > 1 else "no option redispatch"}
  http-reuse always
frontend front
  bind 127.0.0.1:{self.port}
  log stdout len 65535 format raw local0 info
  unique-id-format %[uuid()]
  http-request set-header x-request-id %[unique-id]
  log-format "facts %cp %ID %ts %si:%sp %HM %HU"
{choices}
  default_backend lane0
{backends}
"""

    def _backend(self, lane: int) -> str:
        servers = "\n".join(
            f"  server s{number} 127.0.0.1:{port} pool-max-conn {self.pool} pool-purge-delay 60s"
            for number, port in enumerate(self.servers)
        )
        return f"backend lane{lane}\n{servers}"

    def _lines(self) -> list[str]:
        return (self.folder / "output").read_text("latin-1").splitlines()

    def complaints(self) -> str:
        """Its other lines, and the requests whose end it puts down to the server (S..) with no answer."""
        return "\n".join(
            line if not line.startswith("facts") else f"{line}: prematurely closed" for line in self._lines()
            if not line.startswith("facts") or line.split()[3].startswith("S")
        )

    def forwarded(self) -> list[Forwarded]:
        rows = [line.split(" ", 6) for line in self._lines() if line.startswith("facts")]
        return [
            Forwarded(int(port), identity, _plain(method), _plain(target), not server.startswith("-"))
            for _, port, identity, _, server, method, target in rows
        ]


def _plain(text: str) -> str:
    """Text as it was before haproxy escaped it for the log."""
    return re.sub("#([0-9A-F]{2})", lambda found: chr(int(found[1], 16)), text)


def connect(port: int, timeout_s: float = 10.0) -> socket.socket:
    """A connection to a port of this machine."""
    connection = socket.create_connection(("127.0.0.1", port), timeout_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class Posts:
    """POSTs over keep-alive connections, each answered with its own body; one thread and one pool per lane.

    Args:
        proxy: where to.
        pause: (shortest, longest) seconds between an answer and the next request of the lane.
        each: requests of each lane; None goes on until the end of the block.
    """

    def __init__(self, proxy: Proxy, pause: tuple[float, float], each: int | None = None) -> None:
        self.answered = 0
        self.failures: list[str] = []
        #: How often a lane's request came over the same connection to the server as its last, or another.
        self.reused = self.fresh = 0
        #: The server processes that answered.
        self.workers: set[int] = set()
        self._proxy, self._pause, self._each = proxy, pause, each
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), daemon=True) for lane in range(proxy.lanes)
        ]

    def __enter__(self) -> Posts:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._each is None:
            self._stop.set()
        self.join(30)

    def join(self, within_s: float) -> None:
        """Wait until all lanes have ended."""
        end = time.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0))
            assert not thread.is_alive(), f"after {within_s} s: {self.answered} answers, {self.failures[:3]}"

    def wait_answered(self, more: int, within_s: float = 20.0) -> None:
        """Wait until so many more requests have been answered."""
        goal = self.answered + more
        wait_until(lambda: self.answered >= goal, within_s, f"{more} more answers; {self.failures[:3]}")

    def _run(self, lane: int) -> None:
        chance, number, last = random.Random(lane), 0, ""
        while not self._over(number):
            try:
                with connect(self._proxy.port) as connection:
                    reader, on = AnswerReader(connection), True
                    while on and not self._over(number):
                        number += 1
                        answer = self._ask(connection, reader, lane, number)
                        if answer is None or answer.status != 200 or int(answer.body) != number:
                            self._fail(lane, number, answer)
                            break
                        last = self._count(answer, last)
                        on = not answer.last
                        self._stop.wait(chance.uniform(*self._pause))
            except (OSError, AssertionError, ValueError) as error:
                self._fail(lane, number, error)

    def _over(self, number: int) -> bool:
        return self._stop.is_set() or (self._each is not None and number >= self._each)

    def _ask(
        self, connection: socket.socket, reader: AnswerReader, lane: int, number: int
    ) -> Answer | None:
        body = b"%d" % number
        connection.sendall(
            b"POST /%d/%d HTTP/1.1\r\nhost: a.example\r\ncontent-length: %d\r\n\r\n%s"
            % (lane, number, len(body), body)
        )
        return reader.read("POST")

    def _count(self, answer: Answer, last: str) -> str:
        name = answer.headers["x-connection"]
        with self._lock:
            self.answered += 1
            self.reused += name == last
            self.fresh += name != last
            self.workers.add(int(name.partition("/")[0]))
        return name

    def _fail(self, lane: int, number: int, what: object) -> None:
        with self._lock:
            self.failures.append(f"lane {lane}, request {number}: {what!r}")
