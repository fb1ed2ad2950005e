"""Where control sockets are: a directory that is the user's alone."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from leanserve.rendezvous import answers, control_directory, control_path, find_controls, sweep


def test_the_runtime_directory_is_used_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert control_path(77) == str(tmp_path / "leanserve" / "77.sock")
    assert stat.S_IMODE((tmp_path / "leanserve").stat().st_mode) == 0o700
    assert control_path(78) == str(tmp_path / "leanserve" / "78.sock")


@pytest.mark.parametrize("value", ["", "/nonexistent/run"])
def test_else_it_is_in_tmp(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    assert control_directory() == f"/tmp/leanserve-{os.geteuid()}"


@pytest.mark.parametrize("kind", ["open to others", "link", "file"])
def test_a_directory_that_others_can_reach_is_not_used(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    place = tmp_path / "leanserve"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir(0o700)
        place.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        place.touch(0o600)
    else:
        place.mkdir()
        place.chmod(0o770)
    with pytest.raises(PermissionError, match="not this user's alone"):
        control_path(1)


def test_those_that_live_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert find_controls() == {}
    gone = subprocess.Popen(["true"])
    gone.wait()
    for pid in (os.getpid(), gone.pid):
        Path(control_path(pid)).touch()
    (tmp_path / "leanserve" / "notes.txt").touch()
    assert find_controls() == {os.getpid(): control_path(os.getpid())}


def test_what_the_killed_have_left_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what somebody answers whose pid is another one's here, and nothing of those who live."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    sweep()  # no directory, no error
    gone = [subprocess.Popen(["true"]) for _ in range(2)]
    for process in gone:
        process.wait()
    left, elsewhere = (control_path(process.pid) for process in gone)
    ours = control_path(os.getpid())
    notes = tmp_path / "leanserve" / "notes.txt"
    for path in (left, ours, str(notes)):
        Path(path).touch()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(elsewhere)
        sock.listen()
        sweep()
        assert {str(path) for path in notes.parent.iterdir()} == {elsewhere, ours, str(notes)}
        assert (answers(elsewhere), answers(ours), answers(left)) == (True, False, False)
