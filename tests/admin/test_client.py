"""Finding a server, and asking it."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from leanserve.admin.client import Client, find_server
from leanserve.errors import ServerGone, SettingsError
from leanserve.rendezvous import control_path


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The pid of a process that lives, beside ours; the runtime directory is empty."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    process = subprocess.Popen(["sleep", "60"])
    yield process.pid
    process.kill()
    process.wait()


def test_the_only_one_is_found(other: int) -> None:
    with pytest.raises(ServerGone, match="no server of this user has a socket in"):
        find_server(None, None)
    Path(control_path(other)).touch()
    assert find_server(None, None) == control_path(other)
    assert find_server(other, None) == control_path(other)


def test_among_several_one_is_named(other: int) -> None:
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two:
        for pid, sock in ((other, one), (os.getpid(), two)):
            sock.bind(control_path(pid))
            sock.listen()
        with pytest.raises(SettingsError, match="choose with --pid"):
            find_server(None, None)
        assert find_server(other, None) == control_path(other)
        with pytest.raises(ServerGone, match="no server with pid 1 of"):
            find_server(1, None)


def test_a_pid_that_another_program_has_now_is_no_server(other: int) -> None:
    Path(control_path(other)).touch()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(control_path(os.getpid()))
        sock.listen()
        assert find_server(None, None) == control_path(os.getpid())


@pytest.mark.parametrize("text", ["unix:/some/where", "/some/where"])
def test_a_path_is_taken_as_it_is(other: int, text: str) -> None:
    assert find_server(None, text) == "/some/where"


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(ServerGone, match="No such file"):
        Client(str(tmp_path / "none")).status()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "deaf"))
        with pytest.raises(ServerGone, match="refused"):
            Client(str(tmp_path / "deaf")).order("reload")


def test_one_that_leaves_without_an_answer(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        sock.listen()
        thread = threading.Thread(target=lambda: sock.accept()[0].close())
        thread.start()
        with pytest.raises(ServerGone, match="no server answers on"):
            Client(str(tmp_path / "s")).status()
        thread.join()
