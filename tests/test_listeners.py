"""Listeners on real sockets: what an address means, who may have a port, and what is left at the end."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness import free_port
from leanserve.errors import SettingsError
from leanserve.listeners import (
    Listener,
    Listeners,
    open_listeners,
)
from leanserve.settings import ListenSettings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="one listener per slot: Linux")


@contextmanager
def opened(slots: int = 1, **listen: Any) -> Iterator[Listeners]:
    listeners = open_listeners(ListenSettings(**{"port": 0, **listen}), slots)
    try:
        yield listeners
    finally:
        listeners.close()


def port_of(listeners: Listeners) -> int:
    port = listeners.addresses[0][1]
    assert isinstance(port, int)
    return port


def option(sock: socket.socket, level: int, name: int) -> int:
    return sock.getsockopt(level, name)


def connects(address: Any, family: int = socket.AF_INET) -> bool:
    with socket.socket(family) as sock:
        sock.settimeout(2)
        try:
            sock.connect(address)
        except ConnectionRefusedError:
            return False
    return True


@pytest.mark.parametrize("host", ["no.such.host.invalid", "x" * 300, "a..b"])
def test_an_unknown_host(host: str) -> None:
    with pytest.raises(SettingsError, match="is unknown"), opened(host=host):
        pass


# Who may have a port


def test_all_slots_share_the_port_that_the_kernel_chose() -> None:
    with opened(4) as listeners:
        names = {sock.getsockname() for slot in range(4) for sock in listeners.sockets(slot)}
        assert names == {("127.0.0.1", port_of(listeners))}
        assert listeners.per_slot
        listeners.open_slot(4)
        listeners.open_slot(4)
        assert [sock.getsockname() for sock in listeners.sockets(4)] == list(names)


def test_two_ports_from_the_kernel() -> None:
    with opened(2, bind=("127.0.0.1:0", "127.0.0.1:0")) as listeners:
        assert len(set(listeners.addresses)) == 2
        assert len(listeners.sockets(1)) == 2


def test_nothing_listens_at_first_and_each_slot_for_itself() -> None:
    with opened(2) as listeners:
        address = listeners.addresses[0]
        assert not connects(address)
        listeners.sockets(1)[0].listen(64)
        for _ in range(10):
            assert connects(address)


@pytest.mark.parametrize("accept", ["auto", "shared"])
@pytest.mark.parametrize("reuseport", [False, True])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use(accept: str, reuseport: bool, host: str) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuseport:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind((host, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1:{port}: the port is taken") as caught:
            with opened(2, port=port, accept=accept):
                pass
        assert caught.value.errno == 98


@pytest.mark.parametrize("listening", [0, 1, 2])
def test_a_second_server_that_starts_while_the_first_still_loads(listening: int) -> None:
    with opened(2) as first:
        for slot in range(listening):
            first.sockets(slot)[0].listen(8)
        with pytest.raises(OSError, match="taken"), opened(2, port=port_of(first)):
            pass


def test_a_failed_bind_leaves_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, free, path = taken.getsockname()[1], free_port(), tmp_path / "s"
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="taken"):
            with opened(2, bind=(f"127.0.0.1:{free}", f"unix:{path}", f"127.0.0.1:{port}")):
                pass
        assert len(os.listdir("/proc/self/fd")) == before
        assert not path.exists()
        socket.create_server(("127.0.0.1", free)).close()


def test_the_next_server_can_bind_while_connections_are_in_time_wait() -> None:
    with opened(1) as listeners:
        listener = listeners.sockets(0)[0]
        listener.listen(8)
        port = port_of(listeners)
        with socket.create_connection(("127.0.0.1", port)) as client:
            listener.setblocking(True)
            listener.accept()[0].close()  # whoever closes first has the TIME_WAIT
            assert client.recv(1) == b""
    for accept in ("auto", "shared"):
        with opened(2, port=port, accept=accept):
            pass


def test_after_a_server_of_another_kind() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            other.accept()[0].close()
            assert client.recv(1) == b""
    with opened(2, port=port):
        pass


def test_messages_say_what_to_do() -> None:
    with pytest.raises(OSError, match=r"0\.0\.0\.0 takes all it has"), opened(host="192.0.2.1"):
        pass


# Sockets


@pytest.mark.parametrize("accept", ["auto", "shared", "per-worker"])
def test_options_of_the_sockets(accept: str) -> None:
    """TCP_NODELAY is inherited by what is accepted: a response in two writes waits 40 ms without it."""
    with opened(2, accept=accept) as listeners:
        for sock in listeners.sockets(1):
            assert option(sock, socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert not sock.getblocking()
            assert not sock.get_inheritable()
        listener = listeners.sockets(0)[0]
        listener.listen(8)
        with socket.create_connection(listeners.addresses[0]):
            listener.setblocking(True)
            accepted, _ = listener.accept()
            with accepted:
                assert option(accepted, socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert listeners.per_slot is (accept != "shared")
        assert (listeners.sockets(0)[0] is listeners.sockets(1)[0]) is (accept == "shared")


def test_dual_stack() -> None:
    with opened(2, host="::") as listeners:
        port = port_of(listeners)
        assert listeners.describe() == [f"http://[::]:{port}"]
        listeners.sockets(0)[0].listen(8)
        assert connects(("127.0.0.1", port))
        assert connects(("::1", port), socket.AF_INET6)


def test_ipv6_alone() -> None:
    with opened(1, host="::1") as listeners:
        port = port_of(listeners)
        listeners.sockets(0)[0].listen(8)
        assert not connects(("127.0.0.1", port))
        assert listeners.describe(tls=True) == [f"https://[::1]:{port}"]


def test_several_addresses(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with opened(2, bind=("127.0.0.1:0", "[::1]:0", f"unix:{path}")) as listeners:
        assert len(listeners.addresses) == 3
        assert listeners.describe()[2] == f"unix:{path}"
        assert [sock.family for sock in listeners.sockets(1)] == [
            socket.AF_INET, socket.AF_INET6, socket.AF_UNIX,
        ]
        assert listeners.sockets(0)[2] is listeners.sockets(1)[2]
        assert listeners.shared == 1


@pytest.mark.parametrize("listen", [{"uds": "{path}"}, {"fd": 0}, {"bind": ("fd://0",)}])
def test_per_worker_is_for_tcp(tmp_path: Path, listen: dict[str, Any]) -> None:
    if "uds" in listen:
        listen = {"uds": str(tmp_path / "s")}
    with pytest.raises(SettingsError, match="use auto"), opened(2, accept="per-worker", **listen):
        pass


def test_a_slot_that_is_closed_or_handed_over() -> None:
    with opened(3) as listeners:
        for slot in range(3):
            listeners.sockets(slot)[0].listen(64)
        kept = listeners.detach_slot(2)
        assert listeners.sockets(2) == []
        listeners.open_slot(2)
        assert listeners.sockets(2)[0] is not kept[0]
        assert kept[0].fileno() >= 0
        kept[0].close()
        copy = listeners.sockets(1)[0].dup()
        listeners.refuse(1)
        listeners.close_slot(1)
        for _ in range(20):  # nobody is sent to a copy that nobody accepts from
            assert connects(listeners.addresses[0])
        assert not option(copy, socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        copy.close()


# Unix sockets


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o777])
def test_mode_of_a_unix_socket(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "s"
    before = os.umask(0o077)
    try:
        with opened(2, uds=str(path), uds_mode=mode) as listeners:
            assert stat.S_IMODE(path.stat().st_mode) == mode
            assert not connects(str(path), socket.AF_UNIX)
            listeners.sockets(1)[0].listen(8)
            assert connects(str(path), socket.AF_UNIX)
        assert not path.exists()
    finally:
        os.umask(before)


def test_a_stale_unix_socket_is_removed(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with opened(1, uds=path) as listeners:
        listeners.sockets(0)[0].listen(8)
        assert connects(path, socket.AF_UNIX)


def test_a_live_unix_socket_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(path)
        live.listen(0)
        for _ in range(2):  # the second probe finds a full queue
            with pytest.raises(OSError, match="another process serves it"), opened(1, uds=path):
                pass
        assert os.path.exists(path)


@pytest.mark.parametrize("kind", ["file", "directory", "link", "dangling link", "fifo"])
def test_anything_else_in_that_place_stays(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    target = tmp_path / "target"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(target))
        if kind == "dangling link":
            target.unlink()
        path.symlink_to(target)
    with pytest.raises(OSError, match="no socket is there"), opened(1, uds=str(path)):
        pass
    assert os.path.lexists(path)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"), opened(1, uds=str(tmp_path / "no" / "s")):
        pass


def test_the_file_of_a_successor_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with opened(1, uds=str(path)):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
    assert path.exists()


def test_a_file_that_is_gone_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with opened(1, uds=str(path)):
        path.unlink()


def test_release_keeps_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listeners = open_listeners(ListenSettings(uds=str(path)), 2)
    listeners.release()
    assert path.exists()
    assert listeners.addresses == ()
    listeners.close()
    assert not path.exists()


# Inherited descriptors


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
def test_the_family_of_an_inherited_socket(tmp_path: Path, family: int) -> None:
    with socket.socket(family) as outer:
        path = str(tmp_path / "s")
        outer.bind({socket.AF_UNIX: path, socket.AF_INET6: ("::1", 0)}.get(family, ("127.0.0.1", 0)))
        outer.listen()
        with opened(2, fd=outer.fileno()) as listeners:
            (sock,) = listeners.sockets(1)
            assert sock.family == family
            assert listeners.shared == 1
            if family == socket.AF_UNIX:
                assert listeners.describe() == [f"unix:{path}"]
            else:
                assert option(sock, socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert listeners.addresses == (outer.getsockname()[:2],)
        # Neither closed, nor shut, nor its file removed.
        assert connects(outer.getsockname(), family)


def test_an_abstract_unix_socket() -> None:
    with socket.socket(socket.AF_UNIX) as outer:
        outer.bind(f"\0leanserve-test-{os.getpid()}")
        with opened(1, fd=outer.fileno()) as listeners:
            assert listeners.describe() == [f"unix:@leanserve-test-{os.getpid()}"]


def test_descriptors_that_are_no_listeners(tmp_path: Path) -> None:
    with (tmp_path / "f").open("w") as file, socket.socket(type=socket.SOCK_DGRAM) as datagram:
        for fd, message in [
            (file.fileno(), "not an open socket"),
            (datagram.fileno(), "not a stream socket"),
            (9999, "not an open socket"),
        ]:
            before = len(os.listdir("/proc/self/fd"))
            with pytest.raises(SettingsError, match=message), opened(1, fd=fd):
                pass
            assert len(os.listdir("/proc/self/fd")) == before


def test_descriptor_0() -> None:
    script = (
        "from leanserve.listeners import open_listeners\nfrom leanserve.settings import ListenSettings\n"
        "print(open_listeners(ListenSettings(fd=0), 1).describe()[0])"
    )
    with socket.create_server(("127.0.0.1", 0)) as outer:
        done = subprocess.run(
            [sys.executable, "-c", script],
            stdin=outer, capture_output=True, text=True, timeout=20, check=False,
        )
        assert done.stdout == f"http://127.0.0.1:{outer.getsockname()[1]}\n", done.stderr


def test_listening_again_changes_nothing() -> None:
    with opened(1) as listeners:
        listener = listeners.sockets(0)[0]
        assert isinstance(listener, Listener)
        with listener.dup() as copy:
            assert isinstance(copy, Listener)
            listener.listen(8)
            with socket.create_connection(listeners.addresses[0]) as client:
                copy.listen(16)
                copy.setblocking(True)
                with copy.accept()[0] as accepted:
                    client.sendall(b"x")
                    assert accepted.recv(1) == b"x"


def test_where_no_port_can_be_split_all_share_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A kernel without SO_REUSEPORT (some sandboxes): told once, and refused where it was asked for."""
    monkeypatch.setattr(socket, "SO_REUSEPORT", 9999)  # which this kernel does not know
    caplog.set_level("INFO", "leanserve")
    with opened(3) as listeners:
        assert not listeners.per_slot
        assert listeners.sockets(0) == listeners.sockets(2)
    assert "one listener per address: the kernel refuses SO_REUSEPORT" in caplog.text
    with pytest.raises(SettingsError, match=r"refuses SO_REUSEPORT .*; use auto"):
        open_listeners(ListenSettings(port=0, accept="per-worker"), 2)
    caplog.clear()
    with opened(1), opened(3, accept="shared"):
        assert not caplog.text
