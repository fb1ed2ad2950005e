"""leanserve.bpf: programs that the kernel runs, seen by what it does with connections."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator

import pytest

from leanserve.bpf import choose_listener, drop_new_connections
from leanserve.supervisor.steering import _settle

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="classic BPF programs on sockets: Linux")


def join_group(address: tuple[str, int], family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(address)
    sock.listen(200)
    sock.setblocking(False)
    return sock


@pytest.fixture(params=["127.0.0.1", "::1"])
def group(request: pytest.FixtureRequest) -> Iterator[list[socket.socket]]:
    """Four sockets that listen on one port, in the order in which they began."""
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(join_group((request.param, 0), family))
        address = first.getsockname()[:2]
        yield [first, *(stack.enter_context(join_group(address, family)) for _ in range(3))]


def queued(group: list[socket.socket], clients: int = 60) -> list[int]:
    """How many of so many new connections each of them gets."""
    address = next(sock for sock in group if sock.fileno() >= 0).getsockname()[:2]
    held = [socket.create_connection(address, timeout=5) for _ in range(clients)]
    counts = []
    for sock in group:
        counts.append(0)
        with contextlib.suppress(OSError):
            while True:
                sock.accept()[0].close()
                counts[-1] += 1
    for client in held:
        client.close()
    return counts


def test_only_the_chosen_get_connections(group: list[socket.socket]) -> None:
    for chosen in ([1], [3, 0], [2, 1, 3]):
        choose_listener(group[0], chosen)
        counts = queued(group)
        assert {place for place, count in enumerate(counts) if count} == set(chosen)
        assert sum(counts) == 60


def test_the_last_takes_the_place_of_one_that_ceases(group: list[socket.socket]) -> None:
    members = list(group)
    group[1].shutdown(socket.SHUT_RDWR)
    _settle(members)
    assert members == [group[0], group[3], group[2]]
    choose_listener(group[0], [members.index(group[3])])
    assert queued(group) == [0, 0, 0, 60]


def test_a_place_that_is_not_there_leaves_the_choice_to_the_kernel(group: list[socket.socket]) -> None:
    choose_listener(group[0], [17])
    assert sum(queued(group)) == 60


def test_a_filter_drops_new_connections_and_keeps_those_that_are_queued() -> None:
    with join_group(("127.0.0.1", 0)) as sock:
        with socket.create_connection(sock.getsockname(), timeout=5):
            drop_new_connections(sock)
            with socket.socket() as late:
                late.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    late.connect(sock.getsockname())
            sock.accept()[0].close()


def test_what_is_not_tcp_is_refused() -> None:
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(OSError, match="not TCP"):
        choose_listener(sock, [0])
