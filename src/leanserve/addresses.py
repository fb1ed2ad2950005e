"""Where to listen, as the operator writes it."""

from __future__ import annotations

import os
from typing import NamedTuple

from leanserve.errors import SettingsError
from leanserve.settings import ListenSettings

__all__ = ["Address", "FdAddress", "TcpAddress", "UnixAddress", "parse_address", "parse_addresses"]

_UNIX_PATH_BYTES = 103  # sun_path is 104 bytes on the BSDs and macOS, 108 on Linux, both with a final NUL


class TcpAddress(NamedTuple):
    """A host (name, IPv4 or IPv6 without brackets) and a port (0: the kernel chooses)."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class UnixAddress(NamedTuple):
    """The path of a unix socket."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


class FdAddress(NamedTuple):
    """A descriptor that somebody else bound and handed to us."""

    fd: int

    def __str__(self) -> str:
        return f"fd://{self.fd}"


Address = TcpAddress | UnixAddress | FdAddress


def parse_address(text: str, setting: str = "bind") -> Address:
    """Read ``HOST:PORT``, ``[IPV6]:PORT``, ``:PORT`` (all IPv4 interfaces), ``unix:PATH`` or ``fd://N``.

    Args:
        setting: where it was written, for the message.

    Raises:
        SettingsError: it is none of these.
    """
    if text.startswith("unix:"):
        return _unix(text.removeprefix("unix:"))
    if text.startswith("fd://"):
        number = text.removeprefix("fd://")
        if not (number.isascii() and number.isdigit()):
            raise SettingsError(f"{setting} {text!r}: fd:// takes a descriptor number, as in fd://3")
        return FdAddress(int(number))
    if "://" in text:
        raise SettingsError(f"{setting} {text!r}: leave the scheme away, as in 127.0.0.1:8000")
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        raise SettingsError(f"{setting} {text!r} has no port; write HOST:PORT, [IPV6]:PORT, unix:PATH, fd://N")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise SettingsError(f"{setting} {text!r}: put an IPv6 address in brackets, as in [::1]:8000")
    if not (port.isascii() and port.isdigit()):
        raise SettingsError(f"{setting} {text!r}: {port!r} is not a port number")
    return _tcp(host, int(port))


def parse_addresses(listen: ListenSettings) -> tuple[Address, ...]:
    """All addresses of the settings; ``host`` and ``port`` count when nothing else is given.

    Raises:
        SettingsError: one of them cannot be read, or stands twice.
    """
    found: list[Address] = [parse_address(text) for text in listen.bind]
    if listen.uds is not None:
        found.append(_unix(listen.uds))
    if listen.fd is not None:
        found.append(FdAddress(listen.fd))
    if not found:
        found.append(_tcp(listen.host, listen.port))
    for address in found:
        if found.count(address) > 1 and not (isinstance(address, TcpAddress) and address.port == 0):
            raise SettingsError(f"{address} is given twice")
    return tuple(found)


def _tcp(host: str, port: int) -> TcpAddress:
    if not 0 <= port <= 65535:
        raise SettingsError(f"port {port} is not between 0 and 65535")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    return TcpAddress(host or "0.0.0.0", port)


def _unix(path: str) -> UnixAddress:
    if not path or "\0" in path:
        raise SettingsError("a unix socket needs a path, as in unix:/run/app.sock")
    if len(os.fsencode(path)) > _UNIX_PATH_BYTES:
        raise SettingsError(f"unix socket path is longer than {_UNIX_PATH_BYTES} bytes: {path}")
    return UnixAddress(path)
