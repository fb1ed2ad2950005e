"""Sockets that a service manager passes: whose they are, which are served, and what is refused."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from leanserve import activation
from leanserve.activation import activate, forget_manager, passed_sockets
from leanserve.errors import SettingsError
from leanserve.settings import Settings


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The number of the first of three descriptors in a row: two listen, the last one does not."""
    made = [socket.socket() for _ in range(3)]
    for sock in made[:2]:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
    first = 200
    for place, sock in enumerate(made):
        os.dup2(sock.fileno(), first + place)
        sock.close()
    monkeypatch.setattr(activation, "FIRST_FD", first)
    yield first
    for place in range(3):
        os.close(first + place)


def words(count: int, names: str = "", pid: int | None = None) -> dict[str, str]:
    found = {"LISTEN_PID": str(pid or os.getpid()), "LISTEN_FDS": str(count)}
    return {**found, "LISTEN_FDNAMES": names} if names else found


def test_whose_they_are() -> None:
    assert passed_sockets({}) == []
    assert passed_sockets(words(2)) == [(3, ""), (4, "")]
    assert passed_sockets(words(2, "web:local")) == [(3, "web"), (4, "local")]
    assert passed_sockets(words(2, pid=1)) == []
    for text in ("", "x", "-1", "1.5"):
        assert passed_sockets({**words(0), "LISTEN_FDS": text}) == []


def test_all_are_served_when_no_address_is_set(passed: int) -> None:
    settings = activate(Settings.build(workers=2), words(2))
    assert settings.listen.bind == (f"fd://{passed}", f"fd://{passed + 1}")
    assert settings.pool.workers == 2
    assert not os.get_inheritable(passed)


@pytest.mark.parametrize(
    "flat", [{"port": 9000}, {"host": "::1"}, {"uds": "/tmp/x"}, {"fd": 0}, {"bind": ("127.0.0.1:0",)}]
)
def test_an_address_of_ones_own_wins(passed: int, flat: dict[str, object]) -> None:
    settings = Settings.build(**flat)
    assert activate(settings, words(2)) == settings


def test_by_word_and_by_name(passed: int) -> None:
    both = words(2, "web:local")
    asked = Settings.build(bind=("127.0.0.1:0", "systemd"))
    assert activate(asked, both).listen.bind == ("127.0.0.1:0", f"fd://{passed}", f"fd://{passed + 1}")
    asked = Settings.build(bind=("systemd:local",))
    assert activate(asked, both).listen.bind == (f"fd://{passed + 1}",)


def test_what_is_refused(passed: int) -> None:
    with pytest.raises(SettingsError, match="'systemd': systemd has passed no socket to this process"):
        activate(Settings.build(bind=("systemd",)), {})
    with pytest.raises(SettingsError, match="no socket named 'web' to this process"):
        activate(Settings.build(bind=("systemd:web",)), words(1, "other"))
    with pytest.raises(SettingsError, match=f"descriptor {passed + 2} of systemd does not listen"):
        activate(Settings.build(), words(3))
    with pytest.raises(SettingsError, match=f"descriptor {passed + 3} of systemd is no socket"):
        activate(Settings.build(bind=("systemd:gone",)), words(4, "a:b:c:gone"))


def test_nobody_else_hears_of_it() -> None:
    environment = dict.fromkeys(activation._NAMES, "1") | {"PATH": "/bin"}
    forget_manager(environment)
    assert environment == {"PATH": "/bin"}
