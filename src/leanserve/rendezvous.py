"""Where a supervisor's control socket is, so that ``leanserve ctl`` finds it without being told."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

__all__ = ["answers", "control_directory", "control_path", "find_controls", "sweep"]


def control_directory() -> str:
    """The user's own directory for control sockets; it need not exist."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isdir(runtime):
        return os.path.join(runtime, "leanserve")
    return f"/tmp/leanserve-{os.geteuid() if hasattr(os, 'geteuid') else 0}"


def control_path(pid: int) -> str:
    """The path of one supervisor's socket, in a directory that exists and that nobody else may use.

    Raises:
        OSError: the directory cannot be made, or it is somebody else's: whoever may write there could put
            a socket of his own in the place of ours.
    """
    directory = control_directory()
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        facts = os.lstat(directory)
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
            raise PermissionError(errno.EACCES, f"{directory} is not this user's alone") from None
    return os.path.join(directory, f"{pid}.sock")


def find_controls() -> dict[int, str]:
    """The control sockets of this user's supervisors that live, by pid."""
    return {pid: path for pid, path in _all().items() if _lives(pid)}


def sweep() -> None:
    """Remove what killed supervisors have left: their pid is no more, and nobody listens."""
    for pid, path in _all().items():
        if not _lives(pid) and not answers(path):  # its pid may be of another container
            with contextlib.suppress(OSError):
                os.unlink(path)


def answers(path: str) -> bool:
    """Whether somebody listens on a unix socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        try:
            sock.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            pass  # full, or not for us: somebody is there
    return True


def _all() -> dict[int, str]:
    """The control sockets of this user, by the pid in their name."""
    directory = control_directory()
    try:
        names = os.listdir(directory)
    except OSError:
        return {}
    split = [os.path.splitext(name) for name in names]
    pids = sorted(int(pid) for pid, suffix in split if suffix == ".sock" and pid.isdigit())
    return {pid: os.path.join(directory, f"{pid}.sock") for pid in pids}


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # of another user: a pid that was used again
    return True
