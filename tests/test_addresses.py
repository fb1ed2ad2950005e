"""What an address means, and what is none."""

from __future__ import annotations

from typing import Any

import pytest

from leanserve.addresses import FdAddress, TcpAddress, UnixAddress, parse_address, parse_addresses
from leanserve.errors import SettingsError
from leanserve.settings import ListenSettings


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8000", TcpAddress("127.0.0.1", 8000)),
        ("localhost:0", TcpAddress("localhost", 0)),
        (":80", TcpAddress("0.0.0.0", 80)),
        ("[::1]:8000", TcpAddress("::1", 8000)),
        ("[::]:65535", TcpAddress("::", 65535)),
        ("unix:/run/a b.sock", UnixAddress("/run/a b.sock")),
        ("unix:a:1", UnixAddress("a:1")),
        ("fd://0", FdAddress(0)),
        ("fd://12", FdAddress(12)),
    ],
)
def test_addresses(text: str, address: Any) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no port"),
        ("localhost", "no port"),
        ("8000", "no port"),
        ("http://localhost:1", "leave the scheme away"),
        ("::1:8000", "brackets"),
        ("[::1]", "has no port"),
        ("a:b", "not a port number"),
        ("a:", "not a port number"),
        ("a:-1", "not a port number"),
        ("a:٣", "not a port number"),
        ("a:65536", "between 0 and 65535"),
        ("fd://", "descriptor number"),
        ("fd://x", "descriptor number"),
        ("fd://-1", "descriptor number"),
        ("unix:", "needs a path"),
        ("unix:a\0b", "needs a path"),
        ("unix:" + "x" * 104, "longer than 103 bytes"),
        ("unix:" + "é" * 52, "longer than 103 bytes"),
    ],
)
def test_what_is_no_address(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_address(text)


def test_which_settings_count() -> None:
    assert parse_addresses(ListenSettings(host="::1", port=5)) == (TcpAddress("::1", 5),)
    assert parse_addresses(ListenSettings(host="[::1]", port=5)) == (TcpAddress("::1", 5),)
    together = ListenSettings(bind=("a:1", "fd://7"), uds="/s", fd=0)
    assert parse_addresses(together) == (
        TcpAddress("a", 1), FdAddress(7), UnixAddress("/s"), FdAddress(0),
    )
    with pytest.raises(SettingsError, match="given twice"):
        parse_addresses(ListenSettings(bind=("a:1", "a:1")))
    assert len(parse_addresses(ListenSettings(bind=("a:0", "a:0")))) == 2
