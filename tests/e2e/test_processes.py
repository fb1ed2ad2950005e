"""Four workers under load: a death, a stop, a roll; and a stop that the application hears of."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import AnswerReader, Certificates, Load, Serving, descendants, fetch, wait_until

Serve = Callable[..., Serving]


def test_killed_worker(serve: Serve) -> None:
    server = serve("raw_app:app", "--workers", "4")
    before = server.worker_pids(4)
    with Load(server) as load:
        load.wait_answered(100)
        victim = next(iter(before))
        os.kill(victim, signal.SIGKILL)
        others = before - {victim}
        marks = {pid: load.answered[pid] for pid in others}
        wait_until(lambda: all(load.answered[pid] > marks[pid] + 5 for pid in others), 15, "the others serve")
        wait_until(lambda: len(set(load.answered) - before) == 1, 15, "the fourth is back")
        load.wait_answered(100)
    # The victim's own connections are reset and no others: at most one request of each thread.
    assert len(load.failures) <= 4, load.failures
    assert load.refused == 0
    assert before - {victim} <= descendants(server.pid)


@pytest.mark.parametrize("transport", ["plain", "tls"])
@pytest.mark.parametrize("workers", [1, 4])
def test_sigterm_loses_nothing(
    serve: Serve, transport: str, workers: int, certificates: Certificates
) -> None:
    tls = certificates if transport == "tls" else None
    server = serve("raw_app:app", "--workers", str(workers), certificates=tls)
    server.worker_pids(workers)
    with Load(server, refused_ends=True) as load:
        load.wait_answered(200)
        server.running.send_signal(signal.SIGTERM)
        server.wait_stopped()
    assert load.failures == []


@pytest.mark.parametrize("workers", [1, 4])
def test_sighup_rolls_and_loses_nothing(serve: Serve, workers: int) -> None:
    server = serve("raw_app:app", "--workers", str(workers))
    before = server.worker_pids(workers)
    with Load(server) as load:
        load.wait_answered(100)
        server.running.send_signal(signal.SIGHUP)
        wait_until(lambda: not before & descendants(server.pid), 30, "the old workers are gone")
        load.wait_answered(100)
    assert load.failures == []
    assert load.refused == 0
    after = server.worker_pids(workers)
    assert not after & before


def test_running_request_is_finished(serve: Serve) -> None:
    server = serve("raw_app:app", "--workers", "2")
    with server.connect() as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\nhost: localhost\r\n\r\n")
        time.sleep(0.2)
        server.running.send_signal(signal.SIGTERM)
        answer = AnswerReader(connection).read()
    assert answer is not None
    assert (answer.status, answer.body, answer.last) == (200, b"slow", True)
    server.wait_stopped()


def test_endless_stream_is_cut_at_the_drain_timeout(serve: Serve) -> None:
    server = serve("raw_app:app", "--drain-timeout", "1")
    with server.connect() as connection:
        connection.sendall(b"GET /endless HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert connection.recv(100)
        begun = time.monotonic()
        server.exit_code = None  # how the cut is logged is not this test's business
        server.stop(within_s=8)
    assert time.monotonic() - begun >= 0.9
    assert server.running.returncode == 0, server.output


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_lifespan_shutdown_always_runs(
    serve: Serve, tmp_path: Path, loop: str, number: signal.Signals
) -> None:
    journal = tmp_path / "journal"
    server = serve(
        "raw_app:app", "--workers", "2", "--loop", loop, environment={"LEANSERVE_TEST_JOURNAL": str(journal)}
    )
    workers = server.worker_pids(2)
    # As a terminal does at Ctrl-C: to the whole foreground group.
    os.killpg(server.pid, number)
    server.wait_stopped()
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    for event in ("lifespan.startup", "lifespan.shutdown"):
        assert {entry["pid"] for entry in entries if entry["event"] == event} == workers


def test_second_signal_hurries(serve: Serve) -> None:
    server = serve("raw_app:app", "--workers", "2")
    with server.connect() as connection:
        connection.sendall(b"GET /endless HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert connection.recv(100)
        server.exit_code = None
        server.running.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert server.running.poll() is None
        server.stop(signal.SIGINT, within_s=8)


def test_ttin_and_ttou(serve: Serve) -> None:
    server = serve("raw_app:app", "--workers", "1")
    server.worker_pids(1)
    server.running.send_signal(signal.SIGTTIN)
    two = server.worker_pids(2)
    server.running.send_signal(signal.SIGTTOU)
    wait_until(lambda: len(two & descendants(server.pid)) == 1, 15, "one worker has left")
    assert fetch(server, "/pid").status == 200


def test_orphans_leave(serve: Serve) -> None:
    server = serve("raw_app:app", "--workers", "2")
    workers = server.worker_pids(2)
    server.running.kill()
    server.exit_code = None
    server.running.wait(5)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 5, "the workers are gone")
