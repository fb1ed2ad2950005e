"""What the service manager is told: sd_notify(3), a datagram of NAME=VALUE lines to $NOTIFY_SOCKET."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from math import inf

from leanserve.supervisor.states import SupervisorState

__all__ = ["Notifier"]

logger = logging.getLogger("leanserve")

_SEND_S = 1.0
# While workers load, or finish what runs, the manager's patience is renewed. It is the settings that bound
# these times, and whoever supervises must still be alive to say so.
_EXTEND_S, _EXTEND_EVERY_S = 60.0, 15.0
_PATIENT = (SupervisorState.BOOTING, SupervisorState.STOPPING)


class Notifier:
    """Tells the state of the service whenever it changes, and that the supervisor's loop turns.

    The service is ready with its first worker: from then on the address answers.

    Args:
        environment: NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID; without the first nothing is ever sent.

    Attributes:
        muted: another process speaks for the service.
        next_s: monotonic seconds at which :meth:`look` wants to be called.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.muted = False
        address = environment.get("NOTIFY_SOCKET", "")
        # unix(7): a NUL byte in front is the abstract namespace, which the environment writes as @.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._beat_every_s = _watchdog_s(environment) / 2
        self._beat_at_s = inf if self._beat_every_s == inf else -inf
        self._extend_at_s = -inf
        self._told: SupervisorState | None = None
        self._status = ""
        self._reloads = False

    def __repr__(self) -> str:
        return f"<Notifier {self._address!r}>"

    @property
    def next_s(self) -> float:
        if self.muted or not self._address:
            return inf
        return min(self._beat_at_s, self._extend_at_s if self._patient() else inf)

    def _patient(self) -> bool:
        return self._reloads or self._told in _PATIENT

    def look(self, state: SupervisorState, ready: int, slots: int, now_s: float) -> None:
        """Say what is new; called with every turn of the loop, and only by one that turns.

        Args:
            state: of the service.
            ready: how many workers are.
            slots: how many there should be.
            now_s: monotonic seconds.
        """
        if self.muted or not self._address:
            return
        words: list[str] = []
        serves = state in (SupervisorState.RUNNING, SupervisorState.ROLLING)
        was_serving = self._told in (SupervisorState.RUNNING, SupervisorState.ROLLING)
        if (serves and not was_serving) or (self._reloads and state is SupervisorState.RUNNING):
            words.append("READY=1")
            self._reloads = False
        elif state is SupervisorState.STOPPING and self._told is not state:
            words.append("STOPPING=1")
        self._told = state
        status = f"{state.name.lower()}, {ready} of {slots} workers ready"
        if status != self._status:
            words.append(f"STATUS={status}")
            self._status = status
        if self._patient() and now_s >= self._extend_at_s:
            words.append(f"EXTEND_TIMEOUT_USEC={_EXTEND_S * 1e6:.0f}")
            self._extend_at_s = now_s + _EXTEND_EVERY_S
        if now_s >= self._beat_at_s:
            words.append("WATCHDOG=1")
            self._beat_at_s = now_s + self._beat_every_s
        self.tell(*words)

    def reloading(self) -> None:
        """SIGHUP has come; READY=1 follows when all workers are replaced, or stay."""
        self._reloads = True
        # "MONOTONIC_USEC= ... shall be sent" with it, so that a late answer to an earlier reload is none.
        self.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def tell(self, *words: str) -> None:
        """Send some lines at once, unless another process speaks for the service."""
        if not words or self.muted or not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(_SEND_S)
                sock.sendto("\n".join(words).encode(), self._address)
        except OSError as error:
            logger.debug("the service manager was not told %s: %s", " ".join(words), error)


def _watchdog_s(environment: Mapping[str, str]) -> float:
    """How often the manager wants a sign of life; inf when it wants none of this process."""
    text = environment.get("WATCHDOG_USEC", "")
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return inf
    return int(text) / 1e6 if text.isascii() and text.isdigit() and int(text) else inf
