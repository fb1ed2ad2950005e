"""leanserve.supervisor.reconfigure and what goes down the channels; tests/e2e has real servers."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from leanserve.channel import Channel
from leanserve.errors import SettingsError
from leanserve.listeners import open_listeners
from leanserve.settings import Settings
from leanserve.supervisor.child import Child
from leanserve.supervisor.crew import Crew
from leanserve.supervisor.reconfigure import reconfigure
from leanserve.supervisor.signals import SignalQueue


@pytest.fixture
def worker(crew: Crew) -> Iterator[Channel]:
    """A worker's end of its channel."""
    ours, theirs = Channel.pair()
    crew.children[1] = Child(1, 0, 0, 0, ours, 0.0)
    yield theirs
    ours.close()
    theirs.close()


@pytest.fixture
def crew() -> Iterator[Crew]:
    settings = Settings.build(port=0)
    listeners, signals = open_listeners(settings.listen, 1), SignalQueue()
    crew = Crew("app", settings, listeners, signals, "stand_ins:main")
    yield crew
    crew.close()
    listeners.close()
    signals.close()


def test_workers_are_told_and_each_kind_is_named(
    crew: Crew, worker: Channel, caplog: pytest.LogCaptureFixture
) -> None:
    old = Settings.build(port=0)
    new = old.replace(request_timeout=5, date_header=False, port=1)
    with caplog.at_level(logging.INFO, "leanserve"):
        settings, text = reconfigure(old, lambda: new, crew)
    assert settings == new.replace(port=0)
    assert list(worker.receive()) == [{"set": {"request_timeout": 5}}]
    assert text == (
        "changed request_timeout; needs a reload of the workers: date_header; needs a restart: port"
    )
    warnings = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert warnings == [
        "configuration: needs a reload of the workers: date_header", "configuration: needs a restart: port",
    ]  # fmt: skip


def test_without_a_source_only_files_are_read(crew: Crew, worker: Channel) -> None:
    old = Settings.build(ssl_certfile="a")
    settings, text = reconfigure(old, None, crew)
    assert settings == old
    assert text == "no setting changed in place; certificates are read again"
    assert list(worker.receive()) == [{"set": {}}]


@pytest.mark.parametrize("error", [SettingsError("no TOML"), OSError("no such file")])
def test_what_cannot_be_read_changes_nothing(crew: Crew, worker: Channel, error: Exception) -> None:

    def reread() -> Settings:
        raise error

    with pytest.raises(ValueError, match=f"stays as it was: {error}"):
        reconfigure(Settings(), reread, crew)
    assert list(worker.receive()) == []


def test_a_secret_is_not_logged(crew: Crew, caplog: pytest.LogCaptureFixture) -> None:
    old = Settings.build(ssl_certfile="a")
    with caplog.at_level(logging.DEBUG):
        _, text = reconfigure(old, lambda: old.replace(ssl_keyfile_password="hush"), crew)
    assert "hush" not in text + caplog.text
    assert "ssl_keyfile_password" in text
