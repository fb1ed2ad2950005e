"""X-Forwarded-For and X-Forwarded-Proto of trusted proxies.

``Forwarded`` (RFC 7239) is not read: a proxy that does not know it passes on what the client has written
there, and most know X-Forwarded-For only.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from leanserve.errors import SettingsError
from leanserve.protocol.events import Headers

if TYPE_CHECKING:
    from ipaddress import IPv4Network, IPv6Network

__all__ = ["TrustedProxies"]

# Known to be addresses: ipaddress, a hundredth of a start, is loaded with the first header of a proxy.
_DEFAULT = frozenset({"127.0.0.1", "::1"})
_KNOWN_ADDRESSES = 1024
# Of one request; nobody we know of stands behind so many proxies.
_MOST_HOPS = 64

# Some proxies say "wss" of a WebSocket.
_SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}

# An address, or one with a port behind it. A zone means something on the host that wrote it: it is dropped.
_BRACKETED = re.compile(r"\[([^\]%]*)(?:%[\w.-]+)?\](?::\d{1,5})?", re.ASCII)
_BARE = re.compile(r"([\d.]+):\d{1,5}|([^%]*)(?:%[\w.-]+)?", re.ASCII)


class TrustedProxies:
    """Whom to believe, from the text of ``forwarded_allow_ips`` or another such setting.

    Args:
        text: addresses and networks separated by commas, ``unix`` for peers on a unix socket, or ``*``: the
            direct peer is believed whoever it is, and nobody behind it.
        setting: where the text stands, for the error.

    Raises:
        SettingsError: a part is none of these.
    """

    __slots__ = ("_anyone", "_known", "_networks", "_parts", "_unix")

    def __init__(self, text: str, setting: str = "forwarded_allow_ips") -> None:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        self._anyone = "*" in parts
        self._unix = "unix" in parts
        self._parts = [part for part in parts if part not in ("*", "unix")]
        self._networks: list[IPv4Network | IPv6Network] | None = None
        self._known: dict[str, bool] = {}
        for part in self._parts:
            if part not in _DEFAULT:
                try:
                    _parse_network(part)
                except ValueError as error:
                    raise SettingsError(f"{setting}: {part!r} is no address or network") from error

    def trusts(self, client: tuple[str, int] | None) -> bool:
        """Whether the direct peer is one of them; None is a peer on a unix socket."""
        return self._anyone or (self._unix if client is None else self._lists(client[0]))

    def resolve(
        self, headers: Headers, client: tuple[str, int] | None, scheme: str
    ) -> tuple[tuple[str, int] | None, str]:
        """(client, scheme) as the trusted proxies in front saw them."""
        if not self.trusts(client):
            return client, scheme
        forwarded: list[str] = []
        for name, value in headers:
            if name == b"x-forwarded-for":
                forwarded += value.decode("latin-1").split(",")
            elif name == b"x-forwarded-proto":
                proto = value.decode("latin-1").rpartition(",")[2].strip(" \t").lower()
                scheme = _SCHEMES.get(proto, scheme)
        return self._client(forwarded) or client, scheme

    def _client(self, forwarded: list[str]) -> tuple[str, int] | None:
        """The rightmost hop that is not trusted itself, or the leftmost when all are; None when a part on the
        way there is malformed, or there are too many of them."""
        address: str | None = None
        for item in reversed(forwarded[-_MOST_HOPS:]):
            address = _parse_address(item.strip(" \t"))
            if address is None:
                return None
            if not self._lists(address):
                return address, 0
        return None if address is None or len(forwarded) > _MOST_HOPS else (address, 0)

    def _lists(self, address: str) -> bool:
        """Asked with every request, and by the same few proxies: an answer is kept, but not without bound."""
        known = self._known.get(address)
        if known is None:
            if len(self._known) >= _KNOWN_ADDRESSES:
                self._known.clear()
            known = self._known[address] = self._is_listed(address)
        return known

    def _is_listed(self, address: str) -> bool:
        from ipaddress import ip_address

        try:
            parsed = ip_address(address)
        except ValueError:
            return False
        if self._networks is None:
            self._networks = [_parse_network(part) for part in self._parts]
        mapped = getattr(parsed, "ipv4_mapped", None)  # dual-stack sockets show IPv4 peers as ::ffff:a.b.c.d
        return any((mapped or parsed) in network for network in self._networks)


def _parse_network(text: str) -> IPv4Network | IPv6Network:
    """Raises ValueError."""
    from ipaddress import ip_network

    return ip_network(text, strict=False)


def _parse_address(text: str) -> str | None:
    """An address out of ``192.0.2.1``, ``192.0.2.1:80``, ``2001:db8::1``, ``fe80::1%eth0`` or
    ``[2001:db8::1]:80``."""
    from ipaddress import ip_address

    match = _BRACKETED.fullmatch(text) or _BARE.fullmatch(text)
    if match is None:
        return None
    try:
        return str(ip_address(match[match.lastindex or 0]))
    except ValueError:
        return None
