"""What the supervisor does about the admin process itself; tests/admin/test_process.py has both alive."""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from leanserve.channel import Channel
from leanserve.errors import SettingsError
from leanserve.listeners import open_listeners
from leanserve.server import check_early
from leanserve.settings import Settings
from leanserve.supervisor.child import Child
from leanserve.supervisor.control import Control
from leanserve.supervisor.crew import Crew
from leanserve.supervisor.signals import SignalQueue

Make = Callable[..., Control]


@pytest.fixture
def crew() -> Iterator[Crew]:
    settings = Settings.build(port=0)
    listeners, signals = open_listeners(settings.listen, 1), SignalQueue()
    crew = Crew("app", settings, listeners, signals, "stand_ins:main")
    yield crew
    crew.close()
    listeners.close()
    signals.close()


@pytest.fixture
def make(crew: Crew) -> Iterator[Make]:
    made = []

    def build(**settings: object) -> Control:
        made.append(Control(Settings.build(**settings), crew, lambda: None, lambda order, number: "done"))
        return made[-1]

    yield build
    for control in made:
        control.close()


def test_a_worker_that_does_not_answer_is_not_asked_again(crew: Crew, make: Make) -> None:
    """Its loop may be busy for hours, and a channel that is full would lose the order to leave."""
    control = make()
    ours, theirs = Channel.pair()
    child = Child(1, 0, 0, 0, ours, 0.0)
    crew.children[1] = child
    control._ask_all(7)
    assert list(theirs.receive()) == []  # it boots, and reads nothing
    child.booted = True
    for ticket in (8, 9, 10):
        control._ask_all(ticket)
    assert list(theirs.receive()) == [{"list": 8}]
    control.pass_on(child, {"list": 8, "running": []})
    control._ask_all(11)
    assert list(theirs.receive()) == [{"list": 11}]
    control.note_death(1)
    control._ask_all(12)
    assert list(theirs.receive()) == [{"list": 12}]
    crew.children.clear()
    for channel in (ours, theirs):
        channel.close()


def test_an_answer_says_what_became_of_the_order(make: Make) -> None:
    def obey(order: str, number: int) -> str:
        if order == "no":
            raise ValueError("because")
        return f"{order} {number}"

    control = make()
    control._obey = obey
    assert control._answer({"ask": "yes", "number": 3}) == {"ok": True, "text": "yes 3"}
    assert control._answer({"ask": "yes", "number": "x"}) == {"ok": True, "text": "yes 0"}
    assert control._answer({"ask": "no"}) == {"ok": False, "text": "because"}


def test_the_control_socket_waits_without_a_process(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    control = make()
    with selectors.DefaultSelector() as selector:
        control.open(selector)
        control.keep_time(0.0)
        path = tmp_path / "leanserve" / f"{os.getpid()}.sock"
        assert path.is_socket()
        assert control.pid == 0
        assert [key.data for key in selector.get_map().values()] == [control]  # until somebody knocks
        control.close()
        assert not path.exists()


@pytest.mark.parametrize("address", ["fd://3", "nowhere", "127.0.0.1", "unix:"])
def test_addresses_that_are_refused_early(address: str) -> None:
    with pytest.raises(SettingsError):
        check_early("app:app", Settings.build(admin=address))


def test_more_ready_workers_than_there_are() -> None:
    with pytest.raises(SettingsError, match="ready_workers 3 with workers 2: /readyz would never say yes"):
        check_early("app:app", Settings.build(ready_workers=3, workers=2))
    check_early("app:app", Settings.build(ready_workers=3, workers="auto"))  # nobody knows yet


def test_which_address_is_wrong_is_said(make: Make) -> None:
    with pytest.raises(SettingsError, match=r"^admin '127.0.0.1' has no port"):
        check_early("app:app", Settings.build(admin="127.0.0.1"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match=r"admin: cannot listen on .* choose another port"):
            make(admin=f"127.0.0.1:{taken.getsockname()[1]}")
