"""The table of the new supervisor as the old one sees it; tests/e2e/test_upgrade.py has both alive."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from leanserve.supervisor import upgrade
from leanserve.supervisor.inherit import VARIABLE
from leanserve.supervisor.states import SupervisorMachine, SupervisorMove
from leanserve.supervisor.upgrade import (
    Upgrade,
    UpgradeMachine,
    UpgradeMove,
    UpgradeState,
    _environment,
    _name_of,
    _numbers,
    _start_directory,
)
from machines import reachable, walk


def test_every_state_and_every_move() -> None:
    walk(UpgradeMachine, UpgradeState, UpgradeMove)


def test_nothing_leads_back_from_the_end() -> None:
    assert reachable(UpgradeMachine, UpgradeState.LEFT) <= {UpgradeState.LEFT}


def test_one_that_was_told_to_stop_never_takes_over() -> None:
    assert UpgradeState.LEFT not in reachable(
        UpgradeMachine, UpgradeState.ENDING, without=UpgradeState.NONE
    )


def test_any_state_has_a_way_to_end() -> None:
    for state in UpgradeState:
        machine = UpgradeMachine()
        machine.state = state
        if state is not UpgradeState.NONE:
            assert machine.accepts(UpgradeMove.GONE)


def test_the_words_of_the_manager_are_for_the_new_pid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", "77")
    monkeypatch.setenv("WATCHDOG_PID", "78")
    monkeypatch.setenv("LISTEN_PIDFDID", "5")
    found = _environment({"from": 77})
    assert found["LISTEN_PID"] == str(os.getpid())
    assert found["WATCHDOG_PID"] == "78"  # of another process, and so it stays
    assert "LISTEN_PIDFDID" not in found
    assert json.loads(found[VARIABLE]) == {"pid": os.getpid(), "from": 77}


def test_every_descriptor_is_named() -> None:
    def listeners(*numbers: int) -> dict[str, object]:
        return {"slots": [[number] for number in numbers], "shared": [sum(numbers) + 100], "files": []}

    facts = {
        "channel": 3, "listeners": listeners(4, 5), "groups": [[5, 7, 4]],
        "control": {"a": listeners(), "b": listeners(6)},
    }  # fmt: skip
    assert _numbers(facts) == [3, 4, 5, 6, 7, 100, 106, 109]


def test_the_directory_is_the_shells_name_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "link")
    monkeypatch.setenv("PWD", str(tmp_path / "link"))
    assert _start_directory() == str(tmp_path / "link")
    for other in ("/", "", str(tmp_path / "nosuch")):
        monkeypatch.setenv("PWD", other)
        assert _start_directory() == str(tmp_path / "real")
    assert sys.orig_argv  # what is executed again


@pytest.mark.parametrize(
    ("pid", "parent", "init", "arguments", "said"),
    [
        (1, 0, "leanserve", ["python", "-m", "leanserve"], "the supervisor is PID 1"),
        (7, 1, "tini", ["python", "-m", "leanserve"], "tini ends the container"),
        (7, 1, "systemd", ["python", "-"], "the command that started this process is not known"),
        (7, 1, "systemd", ["python", "-m", "leanserve"], ""),
        (7, 5, "tini", ["python", "-m", "leanserve"], ""),
    ],
)
def test_where_it_cannot_be_done(
    monkeypatch: pytest.MonkeyPatch, pid: int, parent: int, init: str, arguments: list[str], said: str
) -> None:
    machine = SupervisorMachine()
    with pytest.raises(ValueError, match="no worker has been ready yet"):
        _upgrade_of(machine)._check()
    machine.advance(SupervisorMove.READY)
    it = _upgrade_of(machine)
    monkeypatch.setattr(os, "getpid", lambda: pid)
    monkeypatch.setattr(os, "getppid", lambda: parent)
    monkeypatch.setattr(upgrade, "_name_of", lambda _pid: init)
    monkeypatch.setattr(sys, "orig_argv", arguments)
    if said:
        with pytest.raises(ValueError, match=said):
            it._check()
    else:
        it._check()
    machine.advance(SupervisorMove.STOP)
    with pytest.raises(ValueError, match="the server is stopping"):
        it._check()


def _upgrade_of(machine: SupervisorMachine) -> Upgrade:
    """Of a supervisor that has nothing but its state."""
    supervisor = SimpleNamespace(machine=machine, inheritance=SimpleNamespace(owner=True))
    supervisor.crew = SimpleNamespace()
    return Upgrade(cast(Any, supervisor))


def test_the_name_of_a_process() -> None:
    assert _name_of(os.getpid()) == Path("/proc/self/comm").read_text().strip()
    assert _name_of(2**30) == ""
