"""``preload``: the processes that have imported the application, and fork workers when they are asked to.

At most one is asked, the current one. Another one is being made at the start, for a roll (new code), and when
the current one has died; slots that are to have a worker wait for it if there is no other.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Any

from leanserve.channel import TemplateSpec, WorkerSpec
from leanserve.errors import SettingsError
from leanserve.passing import receive_packet, send_spec
from leanserve.settings import Settings
from leanserve.supervisor.child import describe_exit, fork_worker
from leanserve.supervisor.crew import Crew
from leanserve.supervisor.pool import Restarts

__all__ = ["Preload", "Template", "inheriting_orphans"]

logger = logging.getLogger("leanserve")

_ENTRY = "leanserve.worker.template:main"
# A fork copies the tables of all pages, twice: seconds for hundreds of GB.
_FORK_WITHIN_S = 20.0
# For what the application has registered with atexit, at the end of the server.
_END_WITHIN_S = 2.0
_LOOK_EVERY_S = 0.01
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37


class Template:
    """One template process.

    Attributes:
        ready: it has imported the application.
        workers: pids of those that were forked from it.
        error, trace: what it said when it could not.
    """

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self.sock = sock
        self.ready = False
        self.workers: set[int] = set()
        self.error = self.trace = ""
        self.born_s = time.monotonic()
        sock.setblocking(False)

    def __str__(self) -> str:
        return f"template (pid {self.pid})"

    def fork(self, spec: WorkerSpec) -> int:
        """Have a worker forked; its pid, which is that of a child of this process.

        Raises:
            OSError: it was not.
            SettingsError: a setting cannot be told to another process.
        """
        self.sock.settimeout(_FORK_WITHIN_S)
        try:
            with inheriting_orphans():
                send_spec(self.sock, spec)
                answer = receive_packet(self.sock)
        except TimeoutError:
            self.kill()  # what it answers later would be taken for the answer to another question
            raise OSError(errno.ETIMEDOUT, f"the {self} does not answer") from None
        finally:
            self.sock.setblocking(False)
        if answer is None:
            raise OSError(errno.EPIPE, f"the {self} has ended")
        if "pid" not in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]))
        pid: int = answer["pid"]
        self.workers.add(pid)
        return pid

    def hear(self) -> None:
        """Take all that it has said. Raises EOFError at the end of the stream."""
        while True:
            try:
                message: dict[str, Any] | None = receive_packet(self.sock)
            except BlockingIOError:
                return
            except OSError:
                message = None
            if message is None:
                raise EOFError
            if message.get("event") == "ready":
                self.ready = True
                logger.info("%s has imported the application in %.2f s", self, float(message["seconds"]))
            else:
                self.error, self.trace = str(message.get("error")), str(message.get("trace"))

    def wait(self) -> int | None:
        """Its exit code (negative: the signal) if it has ended, else None. Once."""
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            pid, status = self.pid, 0  # somebody else in this process waits for every child
        return os.waitstatus_to_exitcode(status) if pid else None

    def kill(self) -> None:
        """SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def dismiss(self) -> None:
        """Have it end: at once while it imports, else by itself, at the end of the stream."""
        self.sock.close()
        if not self.ready:
            self.kill()


class Preload:
    """Makes templates, and replaces them; without the setting it does nothing.

    Args:
        app: ``module:attribute``.
        settings: all settings.
        crew: its workers are forked from the current template.
        release: drops, in a template, the supervisor's copies of all listeners.
        entry: dotted name of what a worker process runs.
        start: starts a worker in a slot.
        roll: replaces all workers, as there is a new template.
        fail: the first template cannot be made: (why, trace, exit code).
        note_death: is told the pid of each that has ended.

    Attributes:
        start_at_s: when the next template is to be made; monotonic seconds, inf for not at all.
        pids: of all templates that live.
    """

    def __init__(
        self, app: Any, settings: Settings, crew: Crew, release: Callable[[], None], entry: str, *,
        start: Callable[[int], None], roll: Callable[[], None], fail: Callable[[str, str, int], None],
        note_death: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._on = settings.pool.preload
        self._app = app
        self._settings = settings
        self._crew = crew
        self._release = release
        self._entry = entry
        self._start_worker = start
        self._roll = roll
        self._fail = fail
        self._note_death = note_death
        self._restarts = Restarts(settings.crash)
        self._templates: list[Template] = []
        self._current: Template | None = None
        self._coming: Template | None = None
        self._rolls = False
        self._waiting: set[int] = set()
        self.start_at_s = inf
        crew.leave_templates = self._leave

    _selector: selectors.BaseSelector

    @property
    def pids(self) -> set[int]:
        return {template.pid for template in self._templates}

    def open(self, selector: selectors.BaseSelector) -> None:
        """Begin with the first one."""
        self._selector = selector
        if self._on:
            self._make()

    def renew(self) -> bool:
        """Make a new one, with the code as it is now, and roll when it is ready; the old one goes on until
        then, and for good if the new one fails. False without the setting."""
        if not self._on:
            return False
        logger.info("importing the application anew, in a new template process")
        if self._coming is not None:
            self._forget(self._coming)  # what it has imported may be old already
            self._coming.dismiss()
        self.start_at_s = inf
        self._make()
        self._rolls = self._coming is not None
        return True

    def holds(self, slot: int) -> bool:
        """Whether the start of a worker has to wait; it is started when there is a template."""
        if not self._on or self._current is not None:
            return False
        self._waiting.add(slot)
        return True

    def keep_time(self, now_s: float) -> None:
        """Make a template when it is time."""
        if self.start_at_s <= now_s:
            self.start_at_s = inf
            self._make()

    def stop(self) -> None:
        """The server stops: no more workers, and no more templates."""
        self._waiting.clear()
        self.start_at_s = inf
        if self._coming is not None:
            self._coming.kill()

    def handle(self, source: object) -> None:
        """A template's socket is readable."""
        template = next((each for each in self._templates if each.sock is source), None)
        if template is None:
            return
        try:
            template.hear()
        except EOFError:
            self._forget(template)  # its end is known when it is reaped
        if template.ready and template is self._coming:
            self._promote(template)

    def reap(self, *, stopping: bool) -> None:
        """See which templates have ended, and let those end that have no workers left."""
        for template in list(self._templates):
            code = template.wait()
            if code is not None:
                self._templates.remove(template)
                self._note_death(template.pid)
                with contextlib.suppress(EOFError):
                    template.hear()  # its last words
                self._forget(template)
                template.sock.close()
                if not stopping:
                    self._ended(template, template.error or describe_exit(code), code)
        for template in self._templates:
            template.workers &= self._crew.children.keys()
            if template.sock.fileno() >= 0 and not template.workers and self._is_old(template):
                self._forget(template)
                template.dismiss()

    def close(self) -> None:
        """End all of them; those that are ready get a moment to clear away what their import has made."""
        for template in self._templates:
            self._forget(template)
            template.dismiss()
        end = time.monotonic() + _END_WITHIN_S
        for template in self._templates:
            while template.wait() is None:
                if time.monotonic() > end:
                    template.kill()
                time.sleep(_LOOK_EVERY_S)
        self._templates.clear()

    def _make(self) -> None:
        """Fork a template. The reason stands in the log when the kernel refuses, and it is tried again."""
        self._rolls = False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        spec = TemplateSpec(
            app=self._app, settings=self._settings, entry=self._entry, sock=theirs, parent_pid=os.getpid()
        )
        try:
            pid = fork_worker(spec, _ENTRY, lambda: self._leave_supervisor(ours))
        except OSError as error:
            ours.close()
            self._coming = None
            self._try_again(f"cannot start a template process: {error.strerror}", "", 3)
            return
        finally:
            theirs.close()
        self._coming = Template(pid, ours)
        self._templates.append(self._coming)
        self._selector.register(ours, selectors.EVENT_READ, self)
        logger.debug("%s started", self._coming)

    def _leave_supervisor(self, ours: socket.socket) -> None:
        """In a template: what is the supervisor's alone."""
        ours.close()
        self._crew.leave_in_child(None)
        self._release()

    def _leave(self) -> None:
        """In any process that the supervisor forks: its ends of the templates' sockets."""
        for template in self._templates:
            template.sock.close()

    def _promote(self, template: Template) -> None:
        rolls, self._rolls = self._rolls, False
        self._current, self._coming = template, None
        self._crew.fork = template.fork
        waiting, self._waiting = sorted(self._waiting), set()
        for slot in waiting:
            self._start_worker(slot)
        if rolls:
            self._roll()

    def _ended(self, template: Template, why: str, code: int) -> None:
        if template is self._coming:
            self._coming = None
            if self._rolls:
                logger.error("the new template failed, the roll ends and the old one goes on: %s", why)
                if template.trace:
                    logger.debug("%s", template.trace.rstrip())
            if self._current is None:
                self._try_again(f"the {template} failed: {why}", template.trace, code)
        elif template is self._current:
            self._current = None
            if self._coming is None:
                self._try_again(f"the {template} died: {why}", "", code)
        else:
            logger.debug("the old %s has left", template)

    def _try_again(self, what: str, trace: str, code: int) -> None:
        if self._crew.fork is None:  # there never was one
            self._fail(what, trace, code)
            return
        now = time.monotonic()
        wait = self._restarts.note_crash(0, now, 0.0)
        if wait is None:  # those workers that live are better than none; one that dies is not replaced
            wait = self._settings.crash.restart_backoff_max
        logger.error("%s; a new one is made in %.1f s, and no worker before", what, wait)
        self.start_at_s = now + wait

    def _is_old(self, template: Template) -> bool:
        return template is not self._current and template is not self._coming

    def _forget(self, template: Template) -> None:
        with contextlib.suppress(KeyError, ValueError):  # forgotten before, or closed
            self._selector.unregister(template.sock)


@contextmanager
def inheriting_orphans() -> Iterator[None]:
    """For as long as the block lasts, orphans below this process become its children (Linux).

    Not for longer: the application's own orphans would come here, too, and stay as zombies.

    Raises:
        SettingsError: the kernel does not let us.
    """
    import ctypes  # a megabyte, for those who preload

    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int()
    libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise SettingsError(f"preload cannot be used here: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)
