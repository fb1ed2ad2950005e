"""leanserve.asgi.forwarded: whose word about the client is taken."""

from __future__ import annotations

from typing import Any

import pytest

from leanserve.asgi.forwarded import TrustedProxies
from leanserve.errors import SettingsError

PROXY = ("10.0.0.1", 4000)


def resolve(trusted: str, *values: bytes, proto: bytes | None = None, client: Any = PROXY) -> Any:
    headers = [(b"x-forwarded-for", value) for value in values]
    if proto is not None:
        headers.append((b"x-forwarded-proto", proto))
    return TrustedProxies(trusted).resolve(headers, client, "http")


@pytest.mark.parametrize(
    ("trusted", "values", "client"),
    [
        ("10.0.0.1", [b"203.0.113.7"], ("203.0.113.7", 0)),
        ("10.0.0.1", [b"203.0.113.7:1234"], ("203.0.113.7", 0)),
        ("10.0.0.1", [b"2001:db8::1"], ("2001:db8::1", 0)),
        ("10.0.0.1", [b"[2001:DB8::1]:80"], ("2001:db8::1", 0)),
        ("10.0.0.1", [b"[2001:db8::1]"], ("2001:db8::1", 0)),
        # what a client made up stands to the left of what the proxy saw
        ("10.0.0.1", [b"127.0.0.1, 203.0.113.7"], ("203.0.113.7", 0)),
        ("10.0.0.1", [b"127.0.0.1", b"203.0.113.7"], ("203.0.113.7", 0)),
        ("10.0.0.0/8", [b"203.0.113.7, 10.1.2.3,10.0.0.9"], ("203.0.113.7", 0)),
        ("10.0.0.0/8", [b"203.0.113.7", b"10.1.2.3"], ("203.0.113.7", 0)),
        ("10.0.0.0/8", [b"10.1.2.3, 10.9.9.9"], ("10.1.2.3", 0)),  # all trusted: the first
        # malformed on the way there: nothing is believed
        ("10.0.0.0/8", [b"junk, 10.9.9.9"], PROXY),
        ("10.0.0.0/8", [b"junk, 203.0.113.7, 10.9.9.9"], ("203.0.113.7", 0)),
        ("10.0.0.0/8", [b"203.0.113.7, junk"], PROXY),
        ("10.0.0.0/8", [b"203.0.113.7, , 10.9.9.9"], PROXY),
        ("10.0.0.0/8", [b"203.0.113.7" + b", 10.9.9.9" * 63], ("203.0.113.7", 0)),
        ("10.0.0.0/8", [b"203.0.113.7" + b", 10.9.9.9" * 64], PROXY),
        ("10.0.0.0/8", [b"10.9.9.9, " * 63 + b"10.9.9.8"], ("10.9.9.9", 0)),
        ("fe80::/10", [b"203.0.113.7, fe80::1%eth0"], PROXY),  # not of the family that is trusted
        ("10.0.0.1", [b"fe80::1%eth0"], ("fe80::1", 0)),
        ("10.0.0.1", [b"[fe80::1%25]:80"], ("fe80::1", 0)),
        ("10.0.0.1, fe80::/10", [b"203.0.113.7, fe80::1%eth0"], ("203.0.113.7", 0)),
        ("10.0.0.1", [b"fe80::1%a\x1b[31m"], PROXY),
        ("10.0.0.1", [b"203.0.113.7:port"], PROXY),
        ("10.0.0.1", [b"203.0.113.7:"], PROXY),
        ("10.0.0.1", [b"\xa0203.0.113.7"], PROXY),
        ("10.0.0.1", [b""], PROXY),
        ("10.0.0.1", [b"unknown"], PROXY),
        ("10.0.0.1", [b"\xff\xfe"], PROXY),
        ("10.0.0.1", [b"999.1.1.1"], PROXY),
        ("10.0.0.1", [b"_hidden:80"], PROXY),
        ("10.0.0.1", [], PROXY),
        ("*", [b"127.0.0.1, 203.0.113.7"], ("203.0.113.7", 0)),
        ("*, 203.0.113.0/24", [b"192.0.2.1, 203.0.113.7"], ("192.0.2.1", 0)),
        ("192.0.2.1", [b"203.0.113.7"], PROXY),
        ("unix", [b"203.0.113.7"], PROXY),
        ("", [b"203.0.113.7"], PROXY),
    ],
)
def test_client(trusted: str, values: list[bytes], client: Any) -> None:
    assert resolve(trusted, *values) == (client, "http")


@pytest.mark.parametrize(
    ("proto", "scheme"),
    [
        (b"https", "https"), (b"HTTPS", "https"), (b"http", "http"), (b"http, https", "https"),
        (b"https, http", "http"), (b"ftp", "http"), (b"", "http"), (b"\xff", "http"),
    ],
)  # fmt: skip
def test_scheme(proto: bytes, scheme: str) -> None:
    assert resolve("10.0.0.1", proto=proto) == (PROXY, scheme)
    assert resolve("192.0.2.1", proto=proto) == (PROXY, "http")


def test_unix_peers() -> None:
    assert resolve("unix", b"203.0.113.7", proto=b"https", client=None) == (("203.0.113.7", 0), "https")
    assert resolve("*", b"203.0.113.7", client=None) == (("203.0.113.7", 0), "http")
    assert resolve("10.0.0.1", b"203.0.113.7", proto=b"https", client=None) == (None, "http")


def test_ipv4_peers_of_a_dual_stack_socket() -> None:
    mapped = ("::ffff:10.0.0.1", 4000)
    assert resolve("10.0.0.1", b"203.0.113.7", client=mapped)[0] == ("203.0.113.7", 0)
    assert resolve("10.0.0.0/8", b"203.0.113.7, ::ffff:10.0.0.9")[0] == ("203.0.113.7", 0)


def test_a_peer_that_is_no_address_is_not_trusted() -> None:
    assert resolve("10.0.0.1", b"203.0.113.7", client=("host", 1)) == (("host", 1), "http")


@pytest.mark.parametrize("text", ["localhost", "10.0.0.1/33", "10.0.0.1;10.0.0.2", "10.0.0"])
def test_settings_that_are_wrong(text: str) -> None:
    with pytest.raises(SettingsError, match="forwarded_allow_ips"):
        TrustedProxies(text)


def test_what_is_remembered_is_bounded() -> None:
    proxies = TrustedProxies("10.0.0.0/8")
    for number in range(5000):
        address = f"10.0.{number // 256}.{number % 256}"
        headers = [(b"x-forwarded-for", b"203.0.113.7, " + address.encode())]
        assert proxies.resolve(headers, (address, 1), "http")[0] == ("203.0.113.7", 0)
    assert len(proxies._known) <= 1025


@pytest.mark.parametrize(("proto", "scheme"), [(b"wss", "https"), (b"ws", "http"), (b"ftp", "http")])
def test_proxies_that_name_the_websocket_scheme(proto: bytes, scheme: str) -> None:
    proxies = TrustedProxies("127.0.0.1")
    assert proxies.resolve([(b"x-forwarded-proto", proto)], ("127.0.0.1", 1), "http")[1] == scheme


@pytest.mark.parametrize("value", [b"[::1", b"[2001:db8::1]x", b"[2001:db8::1"])
def test_a_malformed_bracket_leaves_the_peer(value: bytes) -> None:
    proxies = TrustedProxies("127.0.0.1")
    client = ("127.0.0.1", 1)
    assert proxies.resolve([(b"x-forwarded-for", value)], client, "http")[0] == client
