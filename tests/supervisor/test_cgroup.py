"""Quotas and memory kills of control groups, version 1 and 2, from made-up folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from leanserve.supervisor.cgroup import cpu_limits, cpu_quota, memory_limit, oom_kills


def tree(folder: Path, proc: str, files: dict[str, str]) -> tuple[Path, Path]:
    (folder / "proc").write_text(proc)
    root = folder / "cgroup"
    root.mkdir()
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "proc", root


V1 = "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n1:name=systemd:/docker/x\n"
_SPLIT = "cpu,cpuacct/docker/x/cpu.cfs"


@pytest.mark.parametrize(
    ("proc", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": ""}, None),
        ("0::/\n", {"cpu.max": "nonsense\n"}, None),
        ("0::/\n", {"cpu.max": "0 0\n"}, None),
        ("0::/\n", {}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2.0),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000", "a/cpu.max": "200000 100000"}, 0.5),
        ("0::/not/here\n", {"cpu.max": "300000 100000"}, 3.0),
        ("0::/../../x\n", {"cpu.max": "300000 100000"}, 3.0),
        (V1, {f"{_SPLIT}_quota_us": "250000", f"{_SPLIT}_period_us": "100000"}, 2.5),
        (V1, {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1.0),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("", {"cpu.max": "100000 100000"}, None),
    ],
)  # fmt: skip
def test_quotas(tmp_path: Path, proc: str, files: dict[str, str], quota: float | None) -> None:
    where = tree(tmp_path, proc, files)
    assert cpu_quota(*where) == quota
    assert cpu_limits(*where) == (len(os.sched_getaffinity(0)), quota)


def test_without_any(tmp_path: Path) -> None:
    nowhere = (tmp_path / "a", tmp_path / "b")
    assert cpu_quota(*nowhere) is None
    assert oom_kills(*nowhere) == 0
    assert cpu_limits(*nowhere) == (len(os.sched_getaffinity(0)), None)
    assert memory_limit(*nowhere) == MACHINE


MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("proc", "files", "limit"),
    [
        ("0::/a\n", {"a/memory.max": "1000000\n"}, 1_000_000),
        ("0::/a\n", {"a/memory.max": "max\n"}, MACHINE),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "3000000\n"}, 3_000_000),
        ("0::/a/b\n", {"a/b/memory.max": "2000000\n", "a/memory.max": "3000000\n"}, 2_000_000),
        (V1, {"memory/docker/x/memory.limit_in_bytes": "4000000\n"}, 4_000_000),
        (V1, {"memory/docker/x/memory.limit_in_bytes": "9223372036854771712\n"}, MACHINE),
        ("0::/\n", {"memory.max": "nonsense\n"}, MACHINE),
    ],
)
def test_memory_limits(tmp_path: Path, proc: str, files: dict[str, str], limit: int) -> None:
    assert memory_limit(*tree(tmp_path, proc, files)) == limit


@pytest.mark.parametrize(
    ("proc", "files", "kills"),
    [
        ("0::/a\n", {"a/memory.events": "low 0\nhigh 3\noom 5\noom_kill 4\n"}, 4),
        ("0::/\n", {"memory.events": "oom_kill 0\n"}, 0),
        (V1, {"memory/docker/x/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"}, 7),
        (V1, {}, 0),
    ],
)
def test_memory_kills(tmp_path: Path, proc: str, files: dict[str, str], kills: int) -> None:
    assert oom_kills(*tree(tmp_path, proc, files)) == kills
