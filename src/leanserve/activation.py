"""What a service manager (systemd) says to one process alone, and the sockets that it passes.

It is all in the environment, with the pid of the process that is meant. Workers, and what an application
starts, get none of it: see :func:`forget_manager`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping

from leanserve.errors import SettingsError
from leanserve.settings import ListenSettings, Settings

__all__ = ["FIRST_FD", "activate", "forget_manager", "passed_sockets"]

#: sd_listen_fds(3): the first of the descriptors; the others follow it.
FIRST_FD = 3

_NAMES = (
    "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES",
    "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC",
)  # fmt: skip

_WORD = "systemd"


def passed_sockets(environment: Mapping[str, str] | None = None) -> list[tuple[int, str]]:
    """Number and name of each descriptor that was passed to this process; none when another one is meant."""
    environment = os.environ if environment is None else environment
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return []
    text = environment.get("LISTEN_FDS", "")
    count = int(text) if text.isascii() and text.isdigit() else 0
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    names += [""] * (count - len(names))
    return [(FIRST_FD + place, names[place]) for place in range(count)]


def activate(settings: Settings, environment: Mapping[str, str] | None = None) -> Settings:
    """The settings with ``fd://N`` in the place of ``systemd`` and ``systemd:NAME``.

    Where no address is set at all, all sockets that were passed are served.

    Raises:
        SettingsError: no such socket was passed, or one cannot be listened on.
    """
    listen, passed = settings.listen, passed_sockets(environment)
    asked = listen.bind or ((_WORD,) if passed and _is_unset(listen) else ())
    bind: list[str] = []
    for text in asked:
        word, colon, name = text.partition(":")
        if word != _WORD:
            bind.append(text)
            continue
        chosen = [number for number, its_name in passed if not colon or its_name == name]
        if not chosen:
            named = f" named {name!r}" if colon else ""
            raise SettingsError(f"bind {text!r}: systemd has passed no socket{named} to this process")
        for number in chosen:
            _check_listens(number)
            bind.append(f"fd://{number}")
    return settings.replace(bind=tuple(bind)) if tuple(bind) != listen.bind else settings


def _is_unset(listen: ListenSettings) -> bool:
    default = ListenSettings()
    return (listen.host, listen.port, listen.uds, listen.fd) == (default.host, default.port, None, None)


def _check_listens(number: int) -> None:
    try:
        os.set_inheritable(number, False)  # as sd_listen_fds does: it is not for what an application starts
        with socket.socket(fileno=os.dup(number)) as sock:
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise SettingsError(f"descriptor {number} of systemd is no socket ({error.strerror})") from None
    if not listens:
        raise SettingsError(
            f"descriptor {number} of systemd does not listen: the unit needs ListenStream= and Accept=no"
        )


def forget_manager(environment: MutableMapping[str, str] | None = None) -> None:
    """In a child: what was said to the supervisor alone.

    A library that speaks to the manager would say in a worker's name that the service is ready, or alive.
    """
    environment = os.environ if environment is None else environment
    for name in _NAMES:
        environment.pop(name, None)
