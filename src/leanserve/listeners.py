"""Bound sockets: from the words of the operator to one set of listeners per worker slot.

Sockets are bound here, at start, so that a port clash is told early. They begin to listen later, when the
first worker is up: until then a TCP probe is refused, which is the truth.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from leanserve.addresses import Address, FdAddress, TcpAddress, UnixAddress, parse_address, parse_addresses
from leanserve.errors import SettingsError
from leanserve.settings import ListenSettings

__all__ = [
    "Address",
    "FdAddress",
    "Listener",
    "Listeners",
    "TcpAddress",
    "UnixAddress",
    "open_listeners",
    "parse_address",
    "parse_addresses",
]

logger = logging.getLogger("leanserve")


class Listener(socket.socket):
    """A bound stream socket of ours; SO_REUSEADDR of a TCP one is set when it begins to listen, not before.

    Linux lets two sockets with SO_REUSEADDR bind one port as long as neither listens, so with it a second
    server that starts while the first still loads its model would join the first one's port unseen. Accepted
    sockets take the option from the listener, and once they are in TIME_WAIT they need it, so that the next
    server can bind.

    Attributes:
        least_backlog: whoever asks for a shorter queue gets this one.
    """

    least_backlog = 0

    def listen(self, backlog: int = 2048, /) -> None:
        """Begin to listen; may be called again."""
        if self.family != getattr(socket, "AF_UNIX", None) and os.name == "posix":
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        super().listen(max(backlog, self.least_backlog))


class _Port(NamedTuple):
    """A TCP port that has one socket per slot: what is needed to open one more."""

    family: int
    sockaddr: tuple[Any, ...]


class _UnixFile(NamedTuple):
    """A socket file of ours; the inode tells it from one that somebody else has put in its place."""

    path: str
    device: int
    inode: int

    def unlink(self) -> None:
        try:
            now = os.lstat(self.path)
            if (now.st_dev, now.st_ino) == (self.device, self.inode):
                os.unlink(self.path)
        except FileNotFoundError:
            pass  # somebody tidied up before us


class Listeners:
    """The sockets of all slots. The supervisor keeps them, workers get copies of the descriptors.

    Attributes:
        per_slot: some addresses have a socket of their own for each slot.
        owns_files: :meth:`close` removes the files of unix sockets; else they are another process's.
    """

    def __init__(self) -> None:
        self.owns_files = True
        self._shared: list[Listener] = []
        self._lent: list[Listener] = []
        self._ports: list[_Port] = []
        self._slots: dict[int, list[Listener]] = {}
        self._files: list[_UnixFile] = []

    @property
    def per_slot(self) -> bool:
        return bool(self._ports)

    @property
    def ports(self) -> int:
        """How many sockets each slot has of its own, the first ones."""
        return len(self._ports)

    @property
    def shared(self) -> int:
        """How many sockets all slots have in common."""
        return len(self._shared) + len(self._lent)

    @property
    def addresses(self) -> tuple[tuple[str, int] | str, ...]:
        """What is really bound: (host, port), or the path of a unix socket."""
        names: list[Any] = [port.sockaddr for port in self._ports]
        names += [sock.getsockname() for sock in (*self._shared, *self._lent) if sock.fileno() >= 0]
        return tuple(_readable(name) for name in names)

    def describe(self, *, tls: bool = False) -> list[str]:
        """URLs that can be clicked on; ``unix:PATH`` for unix sockets."""
        scheme = "https" if tls else "http"
        return [
            f"unix:{name}" if isinstance(name, str) else f"{scheme}://{TcpAddress(*name)}"
            for name in self.addresses
        ]

    def sockets(self, slot: int) -> list[socket.socket]:
        """The listeners of one slot: its own, then those that all share, inherited ones last."""
        return [*self._slots.get(slot, ()), *self._shared, *self._lent]

    def open_slot(self, slot: int) -> None:
        """Open the slot's own sockets, on the ports that the others have. Nothing when they are open.

        Raises:
            OSError: the kernel refused.
        """
        if slot not in self._slots:
            self._slots[slot] = [_reuseport_socket(port.family, port.sockaddr) for port in self._ports]

    def refuse(self, slot: int) -> None:
        """Let the slot's own sockets listen no more, whoever holds copies of them."""
        for sock in self._slots.get(slot, ()):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it does not listen

    def detach_slot(self, slot: int) -> list[Listener]:
        """Hand the slot's own sockets over; the slot may be opened anew, with others."""
        return self._slots.pop(slot, [])

    def close_slot(self, slot: int) -> None:
        """Close our copies of the slot's own sockets: a worker that holds copies decides their end then."""
        for sock in self.detach_slot(slot):
            sock.close()

    def release(self) -> None:
        """Close all our copies, but leave the files of unix sockets in their place."""
        for slot in list(self._slots):
            self.close_slot(slot)
        for sock in (*self._shared, *self._lent):
            sock.close()

    def close(self) -> None:
        """Close all our copies and remove the socket files that are ours."""
        self.release()
        for file in self._files if self.owns_files else ():
            file.unlink()
        self._files.clear()

    # Handing over to another process

    def export(self) -> dict[str, Any]:
        """What :meth:`adopt` needs, for JSON: the descriptors have the same numbers there. Without those that
        were handed to us: who handed them over can do so again."""
        return {
            "ports": [[int(port.family), list(port.sockaddr)] for port in self._ports],
            "slots": [[sock.fileno() for sock in self._slots[slot]] for slot in sorted(self._slots)],
            "shared": [sock.fileno() for sock in self._shared],
            "files": [list(file) for file in self._files],
        }

    @classmethod
    def adopt(cls, facts: Mapping[str, Any], slots: int) -> Listeners:
        """Listeners from what another process has exported; of slots beyond so many we keep no copy.

        Raises:
            OSError: a descriptor is not there.
        """
        listeners = cls()
        listeners._ports = [_Port(family, tuple(sockaddr)) for family, sockaddr in facts["ports"]]
        for slot, numbers in enumerate(facts["slots"]):
            listeners._slots[slot] = [_inherited(number) for number in numbers]
        for slot in range(slots, len(facts["slots"])):
            listeners.close_slot(slot)
        for number in facts["shared"]:
            listeners.share(_inherited(number))
        listeners._files = [_UnixFile(*file) for file in facts["files"]]
        return listeners

    def rename_file(self, path: str) -> None:
        """Give the one unix socket another name; who connects by the old one meanwhile is not lost."""
        (file,) = self._files
        os.rename(file.path, path)
        self._files = [file._replace(path=path)]

    def share(self, sock: Listener) -> None:
        """Take a socket that all slots accept from."""
        sock.setblocking(False)
        self._shared.append(sock)

    def _open(self, address: Address, listen: ListenSettings, per_slot: bool) -> None:
        if isinstance(address, UnixAddress):
            sock, file = _open_unix(address.path, listen.uds_mode)
            self._files.append(file)
            self.share(sock)
        elif isinstance(address, FdAddress):
            sock = _open_fd(address.fd)
            sock.setblocking(False)
            self._lent.append(sock)
        else:
            self._open_tcp(address, per_slot)

    def _open_tcp(self, address: TcpAddress, per_slot: bool) -> None:
        """Open every address that the host name stands for; one that this machine has not is passed over."""
        port, opened, absent = address.port, 0, None
        for family, sockaddr in _resolve(address):
            target = (sockaddr[0], port, *sockaddr[2:])
            try:
                sock = _probed_socket(family, target) if per_slot else _plain_socket(family, target)
            except OSError as error:
                if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    absent = error
                    continue
                raise _explain(error, address) from None
            port = sock.getsockname()[1]
            opened += 1
            if per_slot:
                self._ports.append(_Port(family, sock.getsockname()))
                self._slots.setdefault(0, []).append(sock)
            else:
                self.share(sock)
        if absent is not None and not opened:
            raise _explain(absent, address)


def _inherited(number: int) -> Listener:
    os.set_inheritable(number, False)
    sock = Listener(fileno=number)
    sock.setblocking(False)
    return sock


def open_listeners(
    listen: ListenSettings, slots: int, exported: Mapping[str, Any] | None = None
) -> Listeners:
    """Bind every address of the settings for so many slots; nothing listens yet.

    On Linux each slot gets its own SO_REUSEPORT socket per TCP address unless ``accept`` is ``shared``.
    What another process has exported, for the same addresses, is taken instead of being bound.

    Raises:
        SettingsError: an address cannot be read or used.
        OSError: the kernel refused to bind, with a message that says what to do.
    """
    addresses = parse_addresses(listen)
    why_shared = _why_shared()
    if listen.accept == "per-worker":
        odd = next((a for a in addresses if not isinstance(a, TcpAddress)), None)
        if odd is not None or why_shared:
            why = why_shared or f"{odd} is none"
            raise SettingsError(f"accept=per-worker needs TCP on Linux, and {why}; use auto")
    if listen.accept == "auto" and why_shared and slots > 1:
        logger.info("all workers accept from one listener per address: %s", why_shared)
    listeners = Listeners() if exported is None else Listeners.adopt(exported, slots)
    listeners.owns_files = exported is None
    try:
        for address in addresses:
            if exported is None or isinstance(address, FdAddress):
                listeners._open(address, listen, not why_shared and listen.accept != "shared")
        for slot in range(1, slots):
            listeners.open_slot(slot)
    except (OSError, SettingsError):
        listeners.close()
        raise
    return listeners


def _why_shared() -> str:
    """Why workers cannot have a listener each on one port; "" when they can."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} spreads no connections over the listeners of a port"
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError as error:
        return f"the kernel refuses SO_REUSEPORT ({error.strerror})"
    return ""


def _resolve(address: TcpAddress) -> list[tuple[int, tuple[Any, ...]]]:
    try:
        # As bytes: for text, the codec of international names is loaded.
        host = address.host.encode("ascii") if address.host.isascii() else address.host
        found = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"cannot listen on {address}: host {address.host!r} is unknown") from error
    return list(dict.fromkeys((family, sockaddr) for family, _, _, _, sockaddr in found))


def _new_socket(family: int, sockaddr: tuple[Any, ...]) -> Listener:
    sock = Listener(family, socket.SOCK_STREAM)
    if family == socket.AF_INET6:
        # '::' takes IPv4 too, whatever net.ipv6.bindv6only says
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if sockaddr[0] == "::" else 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)
    return sock


def _bind(sock: Listener, sockaddr: tuple[Any, ...], *, reuseport: bool = False, reuseaddr: bool) -> Listener:
    try:
        if reuseport:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if reuseaddr:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(sockaddr)
    except OSError:
        sock.close()
        raise
    return sock


def _plain_socket(family: int, sockaddr: tuple[Any, ...]) -> Listener:
    # On Windows SO_REUSEADDR would let us steal a port in use.
    return _bind(_new_socket(family, sockaddr), sockaddr, reuseaddr=os.name == "posix")


def _probed_socket(family: int, sockaddr: tuple[Any, ...]) -> Listener:
    """The first socket of a group: SO_REUSEPORT would join a stranger's group, so ask without it first."""
    if sockaddr[1]:
        _bind(_new_socket(family, sockaddr), sockaddr, reuseaddr=True).close()
    return _reuseport_socket(family, sockaddr)


def _reuseport_socket(family: int, sockaddr: tuple[Any, ...]) -> Listener:
    try:
        return _bind(_new_socket(family, sockaddr), sockaddr, reuseport=True, reuseaddr=False)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
    # Connections of another kind of server are in TIME_WAIT here; only SO_REUSEADDR gets past them.
    return _bind(_new_socket(family, sockaddr), sockaddr, reuseport=True, reuseaddr=True)


def _readable(name: Any) -> tuple[str, int] | str:
    if isinstance(name, bytes):
        return os.fsdecode(name.replace(b"\0", b"@"))  # the abstract namespace of Linux, as ss writes it
    return name if isinstance(name, str) else (name[0], name[1])


def _explain(error: OSError, address: TcpAddress) -> OSError:
    hint = {
        errno.EADDRINUSE: "the port is taken by another process; stop it or choose another port",
        errno.EACCES: "not allowed; ports below 1024 need privileges, choose another port",
        errno.EADDRNOTAVAIL: "this machine does not have that address; 0.0.0.0 takes all it has",
    }.get(error.errno or 0, error.strerror or str(error))
    return OSError(error.errno, f"cannot listen on {address}: {hint}")


def _open_unix(path: str, mode: int) -> tuple[Listener, _UnixFile]:
    if not hasattr(socket, "AF_UNIX"):
        raise SettingsError("this platform has no unix sockets; use HOST:PORT")
    _remove_stale(path)
    sock = Listener(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        # The mode stands before it listens: until then every connect is refused.
        os.chmod(path, mode)
        facts = os.lstat(path)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot listen on unix:{path}: {error.strerror}") from None
    return sock, _UnixFile(path, facts.st_dev, facts.st_ino)


def _remove_stale(path: str) -> None:
    """Remove what a dead server left; anything else in that place is an error."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, f"cannot listen on unix:{path}: a file that is no socket is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError:
            pass  # a full queue or a lack of rights: somebody may live there
    raise OSError(errno.EADDRINUSE, f"cannot listen on unix:{path}: another process serves it")


def _open_fd(fd: int) -> Listener:
    """A copy of an inherited socket, so that the descriptor itself is never closed by us."""
    copy = -1
    try:
        copy = os.dup(fd)
        sock = Listener(fileno=copy)
    except OSError as error:
        if copy >= 0:
            os.close(copy)
        raise SettingsError(f"fd {fd} is not an open socket ({error.strerror})") from None
    if sock.type != socket.SOCK_STREAM:
        sock.close()
        raise SettingsError(f"fd {fd} is not a stream socket")
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
