"""Signals become entries of a queue; nothing else happens in a handler."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

__all__ = ["HANDLED", "SignalQueue"]

_NAMES = ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGTTIN", "SIGTTOU", "SIGUSR2", "SIGCHLD")

#: What the supervisor takes, as far as the platform has it.
HANDLED: tuple[signal.Signals, ...] = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class SignalQueue:
    """Catches the supervisor's signals while it is open; readable when one has come.

    Python runs handlers between two byte codes, so a signal that arrives while the main loop is on its way to
    sleep would be seen too late; the wake-up descriptor that the C handler writes to closes that gap.
    """

    def __init__(self) -> None:
        self._pending: list[signal.Signals] = []
        self._former: dict[signal.Signals, Any] = {}
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._former_wakeup = -1

    def open(self) -> None:
        """Take the signals over. Main thread only (ValueError elsewhere)."""
        self._former_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in HANDLED:
            self._former[number] = signal.signal(number, self._handle)

    def close(self, *, ignore: bool = False) -> None:
        """Give them back, or ignore them when the process is about to exit.

        A second SIGTERM that comes in the last moment must not make a death by signal of an orderly end.
        """
        for number, handler in self._former.items():
            signal.signal(number, signal.SIG_IGN if ignore else handler or signal.SIG_DFL)
        signal.set_wakeup_fd(self._former_wakeup)
        os.close(self._reader)
        os.close(self._writer)

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._reader

    def take(self) -> list[signal.Signals]:
        """The signals that have come since the last call, in order."""
        try:
            while os.read(self._reader, 4096):
                pass
        except BlockingIOError:
            pass  # it is empty
        taken, self._pending = self._pending, []
        return taken

    def leave_in_child(self) -> None:
        """In a forked child: default dispositions, and no byte of its signals to the parent's pipe."""
        signal.set_wakeup_fd(-1)
        for number in self._former:
            signal.signal(number, signal.SIG_DFL)
        os.close(self._reader)
        os.close(self._writer)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._pending.append(signal.Signals(number))
