"""Where a supervisor's control socket is, so that ``leanserve ctl`` finds it without being told."""

from __future__ import annotations

import errno
import os
import stat

__all__ = ["control_directory", "control_path", "find_controls"]


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
    directory = control_directory()
    try:
        names = os.listdir(directory)
    except OSError:
        return {}
    found = {}
    for name in sorted(names):
        pid, suffix = os.path.splitext(name)
        if suffix == ".sock" and pid.isdigit() and _lives(int(pid)):
            found[int(pid)] = os.path.join(directory, name)
    return found


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # of another user: a pid that was used again
    return True
