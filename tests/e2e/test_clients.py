"""A FastAPI application, unmodified, and the clients that people use, over every kind of socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import real_clients
from harness import Certificates, Serving

CLIENTS = {**real_clients.HTTP, **real_clients.WEBSOCKET}

# Every transport, both loops, one and four workers; not every product of them.
MODES = [
    "plain-asyncio-1", "plain-uvloop-4", "tls-asyncio-4", "tls-uvloop-1", "uds-uvloop-1", "ipv6-asyncio-1",
]


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.fixture(scope="module", params=MODES)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, certificates: Certificates
) -> Iterator[Serving]:
    transport, loop, workers = request.param.split("-")
    if transport == "ipv6" and not _has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    folder: Path = tmp_path_factory.mktemp("clients")
    with Serving(
        "fastapi_app:app", folder / "log", ["--loop", loop, "--workers", workers],
        host="::1" if transport == "ipv6" else "127.0.0.1",
        certificates=certificates if transport == "tls" else None,
        uds=folder / "socket" if transport == "uds" else None,
    ) as serving:
        yield serving


@pytest.mark.parametrize("client", CLIENTS)
def test_client(server: Serving, client: str) -> None:
    CLIENTS[client](server)


def test_all_workers_answer(server: Serving) -> None:
    workers = int(server.options[-1])
    pids = server.worker_pids(workers)
    assert len(pids) == workers
    assert server.pid not in pids
