"""A configuration, and certificates, that change under a running server: processes and connections stay."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

from harness import Serving, descendants, fetch, wait_until

Serve = Callable[..., Serving]

LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


class Pair:
    """Certificate and key at two paths, which may be replaced; clients trust the authority of all of them."""

    def __init__(self, folder: Path) -> None:
        self.authority = folder / "authority.pem"
        self.certificate, self.key = folder / "certificate.pem", folder / "key.pem"
        self._ca = trustme.CA()
        self._ca.cert_pem.write_to_path(self.authority)
        self.renew()

    def renew(self, *, key: bool = True, kind: trustme.KeyType = trustme.KeyType.ECDSA) -> bytes:
        """A new pair, or a certificate that does not fit the key; the certificate as DER."""
        issued = self._ca.issue_cert("localhost", "127.0.0.1", key_type=kind)
        if key:
            issued.private_key_pem.write_to_path(self.key)
        issued.cert_chain_pems[0].write_to_path(self.certificate)
        return ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())

    def options(self) -> list[str]:
        return ["--ssl-certfile", str(self.certificate), "--ssl-keyfile", str(self.key)]

    def client_context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.authority))


def shown(server: Serving, count: int = 12) -> set[bytes]:
    """The certificates that `count` handshakes show, which is enough to come to two workers."""
    found = set()
    for _ in range(count):
        with server.connect() as connection:
            assert isinstance(connection, ssl.SSLSocket)
            found.add(connection.getpeercert(binary_form=True) or b"")
    return found


def ctl(server: Serving, *words: str) -> tuple[int, Any]:
    """Exit code and JSON of `leanserve ctl`."""
    done = subprocess.run(
        [sys.executable, "-m", "leanserve", "ctl", *words, "--json", "--pid", str(server.pid)],
        capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr


def metric(server: Serving, path: Path, name: str) -> float | None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        connection = http.client.HTTPConnection("localhost")
        connection.sock = sock
        connection.request("GET", "/metrics", headers={"connection": "close"})
        lines = connection.getresponse().read().decode().splitlines()
    return next((float(line.split()[1]) for line in lines if line.startswith(f"{name} ")), None)


def ask(connection: socket.socket, path: str = "/pid") -> bytes:
    """A GET on a connection that stays."""
    connection.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.read()


@LOOPS
def test_certificates_change_under_open_connections(serve: Serve, tmp_path: Path, loop: str) -> None:
    pair = Pair(tmp_path)
    server = serve("raw_app:app", "--workers", "2", "--reload-config-only", "--loop", loop, certificates=pair)
    pids = server.worker_pids(2)
    (old,) = shown(server)
    with server.connect() as connection:
        pid = ask(connection)
        for kind in (trustme.KeyType.RSA, trustme.KeyType.ECDSA):
            new = pair.renew(kind=kind)
            assert shown(server) == {old}  # nobody has said that it is there
            server.running.send_signal(signal.SIGHUP)
            wait_until(lambda new=new: shown(server) == {new}, 15, "handshakes show the new certificate")
            assert ask(connection) == pid
            old = new
        # A certificate that fits no key: the old pair stays, in the workers and in those that come.
        pair.renew(key=False)
        server.running.send_signal(signal.SIGHUP)
        line = "the configuration stays as it was: cannot use certificate"
        wait_until(lambda: line in server.output, 15, "a line")
        assert shown(server) == {old}
        assert ask(connection) == pid
    assert descendants(server.pid) >= pids


def test_a_client_without_a_name_sees_the_new_one(serve: Serve, tmp_path: Path) -> None:
    """Without SNI there is a handshake all the same."""
    pair = Pair(tmp_path)
    server = serve("raw_app:app", certificates=pair)
    new = pair.renew()
    assert ctl(server, "reload", "--config-only") == (
        0, {"ok": True, "text": "no setting changed in place; certificates are read again"},
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    def seen() -> bytes | None:
        with context.wrap_socket(socket.create_connection(("127.0.0.1", server.port), 10)) as connection:
            return connection.getpeercert(binary_form=True)

    wait_until(lambda: seen() == new, 15, "the new certificate")


def test_the_expiry_is_that_of_the_certificate_in_use(serve: Serve, tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    admin = tmp_path / "a.sock"
    server = serve("raw_app:app", "--admin", f"unix:{admin}", certificates=pair)
    name = "leanserve_certificate_expiry_timestamp_seconds"
    assert metric(server, admin, name) is not None
    pair.certificate.write_text("no certificate at all")  # what is shown is valid for as long as before
    before = metric(server, admin, name)
    assert before is not None
    code, said = ctl(server, "reload", "--config-only")
    assert (code, said["ok"]) == (1, False)
    assert "cannot use certificate" in said["text"]
    assert metric(server, admin, name) == before


@LOOPS
def test_settings_change_in_place(serve: Serve, tmp_path: Path, loop: str) -> None:
    file = tmp_path / "leanserve.toml"
    file.write_text('log_level = "info"\nmax_body_size = 10\nbacklog = 50\n')
    server = serve(
        "raw_app:app", "--config", str(file), "--workers", "2", "--loop", loop, "--keep-alive-timeout", "30"
    )
    pids = server.worker_pids(2)

    def status(size: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        try:
            connection.request("POST", "/pid", body=b"x" * size)
            return connection.getresponse().status
        finally:
            connection.close()

    assert {status(20) for _ in range(8)} == {413}
    lines = ('log_level = "debug"', "max_body_size = 30", "backlog = 60", "server_header = false")
    file.write_text("\n".join((*lines, "keep_alive_timeout = 1\n")))
    code, said = ctl(server, "reload", "--config-only")
    assert code == 0, said
    assert "changed max_body_size, log_level" in said["text"]  # keep_alive_timeout is the command line's
    assert "needs a reload of the workers: server_header" in said["text"]
    assert "needs a restart: backlog" in said["text"]
    wait_until(lambda: {status(20) for _ in range(8)} == {200}, 15, "the new limit in both workers")
    assert status(40) == 413
    assert server.worker_pids(2) == pids
    # Twice does no harm, and a file that cannot be read changes nothing.
    assert ctl(server, "reload", "--config-only")[0] == 0
    file.write_text("max_body_size = nonsense\n")
    code, said = ctl(server, "reload", "--config-only")
    assert (code, said["ok"]) == (1, False)
    assert "stays as it was" in said["text"]
    assert status(20) == 200
    # One that comes later has all of it.
    victim = next(iter(pids))
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: len(descendants(server.pid) - {victim}) >= 2, 15, "its successor")
    wait_until(lambda: len(server.worker_pids(2) - pids) == 1, 15, "its successor answers")
    assert {status(20) for _ in range(12)} == {200}
    headers = [dict(fetch(server, "/pid").headers) for _ in range(12)]
    assert {"server" in {str(name).lower() for name in each} for each in headers} == {True, False}


@pytest.mark.parametrize("options", [(), ("--preload",), ("--start-method", "spawn")])
def test_a_worker_that_comes_later_logs_as_the_others(
    serve: Serve, tmp_path: Path, options: tuple[str, ...]
) -> None:
    file = tmp_path / "leanserve.toml"
    file.write_text('log_level = "error"\n')
    server = serve("raw_app:app", "--config", str(file), *options)
    (before,) = server.worker_pids(1)
    file.write_text('log_level = "info"\n')
    assert ctl(server, "reload", "--config-only")[0] == 0
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: " ready in " in server.output, 20, "its successor")
    with server.connect() as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        wait_until(lambda: "INFO refused 127.0.0.1" in server.output, 15, "a line of the worker's")


LATE_APP = """
import asyncio, os
begun = []

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        begun.append(0)
        while len(begun) > 1 and not os.path.exists(MARKER):
            await asyncio.sleep(0.02)
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": str(os.getpid()).encode()})
"""


def test_threads_of_which_some_begin_just_then(serve: Serve, tmp_path: Path) -> None:
    file, marker = tmp_path / "leanserve.toml", tmp_path / "go"
    file.write_text("max_body_size = 10\n")
    (tmp_path / "late_app.py").write_text(f"MARKER = {str(marker)!r}\n{LATE_APP}")
    marker.touch()
    server = serve(
        "late_app:app", "--app-dir", str(tmp_path), "--config", str(file), "--worker-kind", "thread",
        "--workers", "3",
    )  # fmt: skip
    wait_until(lambda: server.output.count(" ready in ") == 1, 20, "all threads")
    marker.unlink()
    server.running.send_signal(signal.SIGHUP)
    wait_until(lambda: len(descendants(server.pid)) >= 2, 15, "a successor")
    file.write_text("max_body_size = 1000\n")
    assert ctl(server, "reload", "--config-only")[0] == 0
    time.sleep(1)  # the successor has heard it, whatever it does
    marker.touch()
    wait_until(lambda: "has left" in server.output, 20, "the successor alone")

    def status() -> int:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        try:
            connection.request("POST", "/pid", body=b"x" * 100)
            return connection.getresponse().status
        finally:
            connection.close()

    assert {status() for _ in range(60)} == {200}


def test_levels_and_time_limits(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "leanserve.toml"
    file.write_text("")
    server = serve("raw_app:app", "--config", str(file))
    assert fetch(server, "/slow").status == 200
    file.write_text('log_level = "debug"\nrequest_timeout = 0.2\n')
    assert ctl(server, "reload", "--config-only")[0] == 0
    wait_until(lambda: fetch(server, "/slow").status == 504, 15, "a limit that requests before had not")
    server.running.send_signal(signal.SIGTTOU)  # the last worker stays
    wait_until(lambda: "got SIGTTOU" in server.output, 15, "a line of level debug")
    file.write_text('log_level = "critical"\n')
    assert ctl(server, "reload", "--config-only")[0] == 0
    wait_until(lambda: fetch(server, "/slow").status == 200, 15, "no limit")
    before = len(server.output)
    assert fetch(server, "/raise").status == 500
    assert server.output[before:].count("exception in the application") == 0
