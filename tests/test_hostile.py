"""Every attack of tests/hostile, small and short; and that the harness sees what it is for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from harness import Certificates
from hostile import measure as measuring
from hostile.__main__ import line, main
from hostile.attacks import ATTACKS, Attack
from hostile.measure import COMMAND, Beside, Row, Server, attacked, measure
from hostile.peer import Outcomes, Peer, Target


@pytest.fixture(scope="module", params=["plain", "tls"])
def under_attack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, certificates: Certificates
) -> Iterator[tuple[bool, Server, Beside]]:
    tls = request.param == "tls"
    folder = tmp_path_factory.mktemp("hostile")
    with attacked(COMMAND, folder, certificates if tls else None, quick=True) as (server, beside):
        yield tls, server, beside
        assert "Traceback" not in server.output


@pytest.mark.timeout(180)
def test_attacks(under_attack: tuple[bool, Server, Beside]) -> None:
    tls, server, beside = under_attack
    for name, attack in ATTACKS.items():
        if attack.tls is tls:
            row = measure(server, beside, name, attack, quick=True)
            assert not row.faults, line(row)
            assert row.alive
            assert sum(row.outcomes.values()) == attack.quick
            assert row.good > 0


ROW = Row("a", 1, 1.0, {"closed": 1}, 0.0, True, 0, 0, 0, 1.0, 20.0, 1.0, 1.0, 1.0, 1.0, 9)


async def _nothing(target: Target, count: int, outcomes: Outcomes) -> None:
    outcomes.counts["closed"] += count


ATTACK = Attack(_nothing, 1, 1, ("closed",))


def test_faults() -> None:
    def found(failures: tuple[str, ...] = (), attack: Attack = ATTACK, **facts: object) -> list[str]:
        return list(measuring._faults(attack, replace(ROW, **facts), list(failures)))

    assert found() == []
    assert found(alive=False) == ["a process died"]
    assert found(fds=2) == ["2 fds left"]
    assert found(tasks=1, protocols=3) == ["1 tasks left", "3 protocols left"]
    assert found(failures=("why",)) == ["1 good requests failed: why"]
    assert "held" in found(outcomes={"held": 1})[0]
    # A deadline that does not exist yet ends nobody.
    assert found(attack=replace(ATTACK, ended_by="no_such_setting"), outcomes={"held": 1}) == []
    assert len(found(attack=replace(ATTACK, ended_by="header_timeout"), outcomes={"held": 1})) == 1


def test_what_stays_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Peer] = []

    async def stays(target: Target, count: int, outcomes: Outcomes) -> None:
        for _ in range(count):
            left.append(await Peer.open(target))
            outcomes.counts["closed"] += 1

    monkeypatch.setattr(measuring, "_SETTLE_S", 0.2)
    with attacked(COMMAND, tmp_path, None, quick=False) as (server, beside):
        row = measure(server, beside, "stays", Attack(stays, 3, 3, ("closed",)), quick=True)
    for peer in left:
        peer.reset()
    assert row.fds == 3
    assert row.faults == ["3 fds left", "3 protocols left"]


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.split() == list(ATTACKS)
    report = tmp_path / "report"
    assert main(["--quick", "--attack", "bare-connects", "--json", str(report)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 faults"
    assert '"attack": "bare-connects"' in report.read_text()
