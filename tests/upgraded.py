"""A real server whose supervisor is replaced, once or several times, by new ones of the same session."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from harness import Serving, alive, wait_until

WITHIN_S = 30.0


@dataclass
class Upgradable(Serving):
    """A :class:`Serving` that ends with the supervisor that is the last one.

    Attributes:
        folder: where its applications are, which it imports before all others.
        line: the command behind Python, when it is not what a :class:`Serving` runs.
        python: by what path Python is called.
        prefix: what is called, and calls Python.
    """

    folder: Path | None = None
    line: Sequence[str] = field(default_factory=list)
    python: Path | None = None
    prefix: Sequence[str] = ()

    def command(self) -> list[str]:
        found = super().command()
        if self.line:
            found = [sys.executable, *self.line]
            if self.python is not None:
                found[0] = str(self.python)
        elif self.folder is not None:
            found[found.index("--app-dir") + 1] = str(self.folder)
        return [*self.prefix, *found]

    @property
    def supervisor(self) -> int:
        """The pid of the supervisor that is the server now."""
        taken = re.findall(r"\[(\d+)\] INFO upgrade: taken over from", self.output)
        return int(taken[-1]) if taken else self.pid

    @property
    def newcomer(self) -> int:
        """The pid of the youngest supervisor that has begun to take over; waits for it."""
        self.wait_output("INFO upgrade: to take over from")
        return int(re.findall(r"\[(\d+)\] INFO upgrade: to take over", self.output)[-1])

    def signal(self, number: signal.Signals) -> None:
        """To the supervisor that is the server now, alone."""
        os.kill(self.supervisor, number)

    def wait_output(self, text: str, count: int = 1) -> None:
        """Wait until so many lines match."""

        def enough() -> bool:
            return len(re.findall(text, self.output)) >= count

        try:
            wait_until(enough, WITHIN_S, f"{count} x {text!r}")
        except AssertionError as error:
            raise AssertionError(f"{error} in\n{self.output}") from None

    def wait_left(self, pid: int) -> None:
        """Wait until a supervisor has ended; the first one is our child, and has to end well."""
        if pid == self.pid:
            assert self.running.wait(WITHIN_S) == 0, self.output
        wait_until(lambda: not alive(pid), WITHIN_S, f"the end of supervisor {pid}\n{self.output}")

    def upgrade(self) -> int:
        """Replace the supervisor; wait until the old one has left; the pid of the new one."""
        before = self.supervisor
        os.kill(before, signal.SIGUSR2)
        wait_until(lambda: self.supervisor != before, WITHIN_S, f"a new supervisor\n{self.output}")
        self.wait_left(before)
        return self.supervisor

    def members(self) -> set[int]:
        """All processes of the session that live."""
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(fields[3]) == self.pid and fields[0] != "Z":
                        found.add(int(entry.name))
        return found

    def end(self) -> None:
        """SIGTERM to the server; wait until nothing of it is left."""
        os.kill(self.supervisor, signal.SIGTERM)
        wait_until(lambda: not self.members(), WITHIN_S, f"the end of all\n{self.output}")
        self.running.wait(5)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(self.output)
        try:
            if kind is None and self.members():
                self.end()
        finally:
            self.kill()
