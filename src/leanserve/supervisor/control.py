"""The admin process as the supervisor sees it: started, started again, and what operators ask through it.

With ``admin`` set it stands beside the workers from the beginning. Else it is started by the first connection
to the control socket: a server that nobody asks pays for a descriptor.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from math import inf
from typing import Any

from leanserve.channel import AdminSpec, Channel
from leanserve.errors import SettingsError
from leanserve.listeners import Listeners, open_listeners
from leanserve.rendezvous import control_path, sweep
from leanserve.settings import ListenSettings, Settings
from leanserve.supervisor.child import Child, describe_exit, fork_worker
from leanserve.supervisor.crew import Crew
from leanserve.supervisor.pool import Restarts

__all__ = ["Control"]

logger = logging.getLogger("leanserve")

_BACKLOG = 128
_FORK_AGAIN_S = 1.0
_KEPT_DEAD = 1000
# What the process may take to answer whom it has accepted, when another one takes its place.
_RETIRE_S = 5.0


class Control:
    """Owns the sockets of the admin process, and the process.

    Args:
        settings: all settings.
        crew: whose scoreboard it reads, and whose dead it hears of.
        leave: what a forked process has to leave behind, besides what is the crew's.
        obey: runs an order (its name, a number) and says what it did; ValueError says why it did not.
        entry: dotted name of what the process runs; resolved there, never here.
        exported: what :meth:`export` of another supervisor's said, whose sockets are to be ours.

    Raises:
        SettingsError: the address cannot be used.
        OSError: it cannot be bound.
    """

    def __init__(
        self,
        settings: Settings,
        crew: Crew,
        leave: Callable[[], None],
        obey: Callable[[str, int], str],
        entry: str = "leanserve.admin.process:main",
        exported: Mapping[str, Any] | None = None,
    ) -> None:
        self.start_at_s = inf
        self.pid = 0
        self._settings = settings
        self._crew = crew
        self._leave = leave
        self._obey = obey
        self._entry = entry
        self._restarts = Restarts(settings.crash)
        self._opened: dict[str, Listeners] = {}
        self._adopted = {word: Listeners.adopt(facts, 1) for word, facts in (exported or {}).items()}
        for adopted in self._adopted.values():
            adopted.owns_files = False
        self._retired = False
        self._channel: Channel | None = None
        self._asked: set[int] = set()
        self._dead: deque[int] | None = None
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            self._dead = deque(maxlen=_KEPT_DEAD)  # the admin process tells prometheus_client of them
        if settings.admin.admin is not None:
            self._listen_for_admin(settings.admin.admin)
        crew.leave_more = self._leave_in_child

    _selector: selectors.BaseSelector
    _born_s = 0.0

    def __repr__(self) -> str:
        return f"<Control pid {self.pid}>"

    @property
    def _waits_for_none(self) -> bool:
        """The process stands from the beginning, whether or not anybody connects."""
        return self._settings.admin.admin is not None or self._dead is not None

    def _listen(self, word: str, address: str) -> Listeners:
        # It listens at once, so that no second server can bind the port; who connects early waits.
        listen = ListenSettings(bind=(address,), uds_mode=0o600, accept="shared")
        adopted = word in self._adopted
        opened = self._opened[word] = self._adopted.pop(word) if adopted else open_listeners(listen, 1)
        for sock in opened.sockets(0):
            sock.listen(_BACKLOG)
        return opened

    def _listen_for_admin(self, address: str) -> None:
        try:
            self._listen(address, address)
        except OSError as error:  # there is more than one address to be taken
            raise OSError(error.errno, f"admin: {error.strerror}") from None

    def _sockets(self) -> list[socket.socket]:
        return [sock for opened in self._opened.values() for sock in opened.sockets(0)]

    # Life

    def open(self, selector: selectors.BaseSelector) -> None:
        """Open the control socket; start the process, or wait for the first who asks.

        From here on sockets of another supervisor's are ours, and not before.
        """
        self._selector = selector
        for url in [url for opened in self._opened.values() for url in opened.describe()]:
            logger.info("admin on %s", url)
        self._open_control_socket()
        for opened in (*self._opened.values(), *self._adopted.values()):
            opened.owns_files = True
        for unwanted in self._adopted.values():
            unwanted.close()
        self._adopted.clear()
        if self._opened or self._dead is not None:
            self.start_at_s = 0.0

    def _open_control_socket(self) -> None:
        path = self._settings.admin.control_socket
        if path is None or not hasattr(socket, "AF_UNIX"):
            return
        try:
            address = control_path(os.getpid()) if path == "auto" else path
            if path == "auto":
                sweep()
            opened = self._listen(f"control {path}", f"unix:{address}")
            if path == "auto" and opened.addresses != (address,):
                opened.rename_file(address)
        except (OSError, SettingsError) as error:
            # Not worth a server that does not start: a read-only file system has no place for it.
            level = logging.DEBUG if path == "auto" else logging.WARNING
            logger.log(level, "no control socket: %s", getattr(error, "strerror", None) or error)

    def export(self) -> dict[str, Any]:
        """Its sockets, for another supervisor: by what the settings say of each."""
        return {word: opened.export() for word, opened in self._opened.items()}

    def retire(self) -> None:
        """Another supervisor has all the sockets: the process answers whom it has accepted, and leaves."""
        self._retired = True
        self.start_at_s = time.monotonic() + _RETIRE_S if self.pid else inf
        for opened in self._opened.values():
            opened.owns_files = False
        if self._channel is not None:
            self._channel.send({"retire": True})
        else:
            for sock in self._sockets():
                with contextlib.suppress(KeyError):  # nobody watches before the process may start
                    self._selector.unregister(sock)

    @property
    def leaving(self) -> bool:
        """The process was told to, and has not yet."""
        return self._retired and self.pid != 0

    def keep_time(self, now_s: float) -> None:
        """Start the process, or wait for somebody who asks, when it is time."""
        if self.start_at_s <= now_s:
            self.start_at_s = inf
            if self._retired:
                os.kill(self.pid, signal.SIGKILL)
            elif self._waits_for_none:
                self._start()
            else:
                self._watch_sockets()

    def _watch_sockets(self) -> None:
        for sock in self._sockets():
            self._selector.register(sock, selectors.EVENT_READ, self)

    def _start(self) -> None:
        ours, theirs = Channel.pair()
        fd = self._crew.scoreboard.fd
        spec = AdminSpec(
            settings=self._settings, listeners=self._sockets(), channel=theirs, scoreboard_fd=fd,
            parent_pid=os.getpid(),
        )  # fmt: skip
        try:
            self.pid = fork_worker(spec, self._entry, lambda: self._leave_all(ours))
        except OSError as error:
            ours.close()
            logger.error("cannot start the admin process: %s", error.strerror)
            self.start_at_s = time.monotonic() + _FORK_AGAIN_S
            return
        finally:
            theirs.close()
        self._born_s = time.monotonic()
        self._channel = ours
        self._selector.register(ours, selectors.EVENT_READ, self)
        self._crew.scoreboard.tell_server(watched=1)
        for pid in self._dead or ():
            ours.send({"dead": pid})
        logger.debug("admin process started (pid %d)", self.pid)

    def _leave_all(self, ours: Channel) -> None:
        """In the admin process: what is the supervisor's and the workers' alone."""
        self._crew.leave_in_child(ours, but_more=True)
        self._leave()

    def _leave_in_child(self) -> None:
        """In a worker: our sockets and channel. A copy there would hold the port when all others are gone."""
        if self._channel is not None:
            self._channel.close()
        for opened in (*self._opened.values(), *self._adopted.values()):
            opened.release()

    def reap(self) -> None:
        """See whether the process has ended; it is not let go without."""
        if not self.pid:
            return
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            pid, status = self.pid, 0  # somebody else in this process waits for every child
        if pid != self.pid:
            return
        self.pid = 0
        self._forget_channel()
        if self._retired:
            self.start_at_s = inf
            return
        now = time.monotonic()
        wait = self._restarts.note_crash(0, now, now - self._born_s)
        if wait is None:  # nobody is served worse for it, so the server does not give up
            wait = self._settings.crash.restart_backoff_max
        self.start_at_s = now + wait
        how = describe_exit(os.waitstatus_to_exitcode(status))
        logger.error("the admin process (pid %d) died: %s", pid, how)

    def note_death(self, pid: int) -> None:
        """A worker has ended."""
        self._asked.discard(pid)
        if self._dead is not None:
            self._dead.append(pid)
            if self._channel is not None:
                self._channel.send({"dead": pid})

    def close(self) -> None:
        """End the process, and what it listened on."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
        if self._channel is not None:
            self._channel.close()
        for opened in (*self._opened.values(), *self._adopted.values()):
            opened.close()

    # What comes

    def handle(self, source: object) -> None:
        """Something is readable: the channel, or a socket while no process accepts from it."""
        if self._channel is not None and source is self._channel:
            self._hear(self._channel)
        elif isinstance(source, socket.socket) and not self.pid:  # not the channel of one that has died
            for sock in self._sockets():
                self._selector.unregister(sock)
            self._start()

    def _hear(self, channel: Channel) -> None:
        try:
            for message in channel.receive():
                if message.get("ask") == "list":
                    self._ask_all(message.get("id"))
                elif message.get("ask") == "queues":
                    channel.send({"id": message.get("id"), "queues": self._crew.measure_queues()})
                elif "ask" in message:
                    channel.send({"id": message.get("id"), **self._answer(message)})
        except EOFError:
            self._selector.unregister(channel)  # its end is known when it is reaped

    def _ask_all(self, ticket: object) -> None:
        """Ask the workers what they have at work; not again one that has not answered, for it may never
        read what we write."""
        for pid, child in self._crew.children.items():
            if child.booted and pid not in self._asked:
                self._asked.add(pid)
                child.channel.send({"list": ticket})

    def pass_on(self, child: Child, message: dict[str, object]) -> None:
        """A worker says what it has at work."""
        self._asked.discard(child.pid)
        if self._channel is not None:
            slot, running = message.get("slot"), message.get("running")
            worker = (slot if isinstance(slot, int) else child.slot) + 1  # a process may have several
            self._channel.send({"id": message.get("list"), "worker": worker, "running": running})

    def _answer(self, message: dict[str, object]) -> dict[str, object]:
        number = message.get("number", 0)
        try:
            text = self._obey(str(message["ask"]), number if isinstance(number, int) else 0)
        except ValueError as error:
            return {"ok": False, "text": str(error)}
        return {"ok": True, "text": text}

    def _forget_channel(self) -> None:
        if self._channel is not None:
            with contextlib.suppress(KeyError):  # at its end, before
                self._selector.unregister(self._channel)
            self._channel.close()
            self._channel = None
