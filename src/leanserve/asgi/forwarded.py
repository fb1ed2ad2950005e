"""X-Forwarded-For and X-Forwarded-Proto of trusted proxies."""

from __future__ import annotations

import ipaddress

from leanserve.errors import SettingsError
from leanserve.protocol.events import Headers

__all__ = ["TrustedProxies"]

_KNOWN_ADDRESSES = 1024

# Some proxies say "wss" of a WebSocket.
_SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class TrustedProxies:
    """Whom to believe, from the text of ``forwarded_allow_ips``.

    Args:
        text: addresses and networks separated by commas, ``unix`` for peers on a unix socket, or ``*``: the
            direct peer is believed whoever it is, and nobody behind it.

    Raises:
        SettingsError: a part is none of these.
    """

    __slots__ = ("_anyone", "_known", "_networks", "_unix")

    def __init__(self, text: str) -> None:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        self._anyone = "*" in parts
        self._unix = "unix" in parts
        self._networks: list[Network] = []
        self._known: dict[str, bool] = {}
        for part in parts:
            if part not in ("*", "unix"):
                try:
                    self._networks.append(ipaddress.ip_network(part, strict=False))
                except ValueError as error:
                    raise SettingsError(f"forwarded_allow_ips: {part!r} is no address or network") from error

    def resolve(
        self, headers: Headers, client: tuple[str, int] | None, scheme: str
    ) -> tuple[tuple[str, int] | None, str]:
        """(client, scheme) as the trusted proxies in front saw them."""
        peer_is_trusted = self._anyone or (self._unix if client is None else self._trusts(client[0]))
        if not peer_is_trusted:
            return client, scheme
        forwarded: list[str] = []
        for name, value in headers:
            if name == b"x-forwarded-for":
                forwarded += [item.strip() for item in value.decode("latin-1").split(",")]
            elif name == b"x-forwarded-proto":
                proto = value.decode("latin-1").rpartition(",")[2].strip().lower()
                scheme = _SCHEMES.get(proto, scheme)
        return self._client(forwarded) or client, scheme

    def _client(self, forwarded: list[str]) -> tuple[str, int] | None:
        """The rightmost hop that is not trusted itself; None when a part on the way there is malformed."""
        found: tuple[str, int] | None = None
        for item in reversed(forwarded):
            address = _parse_address(item)
            if address is None:
                return found
            found = (address, 0)
            if not self._trusts(address):
                return found
        return found

    def _trusts(self, address: str) -> bool:
        """Asked with every request, and by the same few proxies: an answer is kept, but not without bound."""
        known = self._known.get(address)
        if known is None:
            if len(self._known) >= _KNOWN_ADDRESSES:
                self._known.clear()
            known = self._known[address] = self._is_listed(address)
        return known

    def _is_listed(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        mapped = getattr(parsed, "ipv4_mapped", None)  # dual-stack sockets show IPv4 peers as ::ffff:a.b.c.d
        return any((mapped or parsed) in network for network in self._networks)


def _parse_address(text: str) -> str | None:
    """An address out of ``192.0.2.1``, ``192.0.2.1:80``, ``2001:db8::1`` or ``[2001:db8::1]:80``."""
    if text.startswith("["):
        text, bracket, port = text[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            return None
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None
