"""Tells the supervisor that a source file has changed. Development only."""

from __future__ import annotations

import os
import signal
from fnmatch import fnmatch
from pathlib import Path

from leanserve.errors import SettingsError
from leanserve.settings import ReloadSettings

__all__ = ["Watcher", "matches"]

_LINE_BYTES = 65536


class Watcher:
    """A small process of its own: watchfiles has threads, and who has threads had better not fork."""

    def __init__(self, settings: ReloadSettings) -> None:
        self._settings = settings
        self._pid = 0
        for name in settings.reload_dir:
            if not Path(name).is_dir():
                raise SettingsError(f"reload_dir {name} is no directory")
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._partial = b""

    def open(self) -> None:
        """Start watching."""
        parent = os.getpid()  # asked before the fork: afterwards it may be dead already
        self._pid = os.fork()
        if self._pid:
            os.close(self._writer)
            return
        try:
            os.close(self._reader)
            _watch(self._settings, self._writer, parent)
        finally:
            os._exit(0)

    def fileno(self) -> int:
        """Readable when files have changed."""
        return self._reader

    def take(self) -> list[str]:
        """Names of the files that have changed since the last call.

        Raises:
            EOFError: the watching process is gone.
        """
        try:
            data = os.read(self._reader, _LINE_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise EOFError
        self._partial += data
        *lines, self._partial = self._partial.split(b"\n")
        return [os.fsdecode(line) for line in dict.fromkeys(lines)]

    def close(self) -> None:
        """Stop watching."""
        try:
            if self._pid:
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass  # it went before
        os.close(self._reader)


def matches(path: str, settings: ReloadSettings) -> bool:
    """Whether a change of this file asks for a reload."""
    name = os.path.basename(path)
    wanted = any(fnmatch(name, glob) or fnmatch(path, glob) for glob in settings.reload_include)
    unwanted = any(fnmatch(name, glob) or fnmatch(path, glob) for glob in settings.reload_exclude)
    return wanted and not unwanted


def _watch(settings: ReloadSettings, writer: int, parent: int) -> None:
    """In the watching process: write changed names until the supervisor is gone."""
    import watchfiles

    for name in ("SIGINT", "SIGHUP", "SIGQUIT", "SIGTTIN", "SIGTTOU"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    usual = watchfiles.DefaultFilter()  # leaves out .git, .venv, node_modules and their like
    directories = [Path(name) for name in settings.reload_dir] or [Path.cwd()]
    for changes in watchfiles.watch(
        *directories,
        watch_filter=lambda change, path: usual(change, path) and matches(path, settings),
        debounce=max(int(settings.reload_delay * 1000), 1),
        rust_timeout=1000,
        yield_on_timeout=True,
        raise_interrupt=False,
    ):
        if os.getppid() != parent:
            return
        names = sorted(os.path.relpath(path) for _, path in changes)
        if names:
            try:
                os.write(writer, b"".join(os.fsencode(name) + b"\n" for name in names[:20]))
            except OSError:
                return
