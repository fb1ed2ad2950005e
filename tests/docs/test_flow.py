"""The drawings of docs/explain/flow.md: every name exists, and is called when the drawing says so."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from docs.documents import blocks, codes, read

TRACING = Path(__file__).with_name("tracing.py")
SCENES = ["request", "websocket", "death", "roll"]
_CALL = re.compile(r"\|-[ -]*([A-Za-z_]+)[ -]*>(?=\|)|\|<[ -]*([A-Za-z_]+)[ -]*-(?=\|)|\|\* ([A-Za-z_]+)")


@dataclass(frozen=True, slots=True)
class Lane:
    """One line of a drawing: the process it stands for and the prefix of its functions ("" is not ours)."""

    role: str
    prefix: str


@dataclass(frozen=True, slots=True)
class Hop:
    """A call: who is called in which process."""

    role: str
    name: str


def _lanes(header: list[str], columns: list[int]) -> list[Lane]:
    words: list[list[str]] = [[] for _ in columns]
    for line in header:
        for found in re.finditer(r"\S+(?: \S+)*", line):
            middle = (found.start() + found.end()) / 2
            nearest = min(range(len(columns)), key=lambda index: abs(columns[index] - middle))
            words[nearest].append(found[0])
    return [_lane(parts) for parts in words]


def _lane(parts: list[str]) -> Lane:
    files = [part for part in parts if part.endswith(("/", ".py"))]
    if not files:
        return Lane(parts[0], "")
    role = parts[0] if parts[0] not in files else "worker"
    module = "".join(files).removesuffix(".py").replace("/", ".")
    return Lane(role, module if parts[-1] == "-" else f"{module}.{parts[-1]}")


def _hops(text: str) -> list[Hop]:
    lines = text.splitlines()
    first = next(index for index, line in enumerate(lines) if re.fullmatch(r"[ |]+", line))
    columns = [found.start() for found in re.finditer(r"\|", lines[first])]
    lanes = _lanes(lines[:first], columns)
    hops = []
    for line in lines[first:]:
        calls = list(_CALL.finditer(line))
        assert calls or not re.search(r"--|\*", line), f"not understood: {line}"
        for found in calls:
            at = found.end() if found[1] else found.start()
            lane = lanes[columns.index(at)]
            if lane.prefix:
                name = found[1] or found[2] or found[3]
                hops.append(Hop(lane.role, f"{lane.prefix}.{name}"))
    return hops


@cache
def drawing(scene: str) -> list[Hop]:
    (text,) = (block.text for block in blocks(read("explain/flow.md")) if block.kind == f"sequence {scene}")
    return _hops(text)


def also_called(scene: str) -> list[str]:
    """The names in the list below a drawing."""
    section = read("explain/flow.md").partition(f"```sequence {scene}\n")[2].partition("\n## ")[0]
    return [name for name in codes(section.partition("\n```\n")[2]) if name.count(".") >= 2]


@cache
def trace(scene: str) -> list[tuple[int, str]]:
    """(pid, function) in the order of the calls."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "calls")
        done = subprocess.run(
            [sys.executable, str(TRACING), scene, str(file)], capture_output=True, text=True, timeout=55
        )
        assert done.returncode == 0, done.stderr
        pairs = (line.split(" ", 1) for line in file.read_text().splitlines())
        return [(int(pid), name) for pid, name in pairs]


def roles(scene: str) -> dict[str, int]:
    """The process of each role: the program itself, its first worker, and that one's successor."""
    pids = list(dict.fromkeys(pid for pid, _ in trace(scene)))
    if scene in ("request", "websocket"):
        return {"worker": pids[0]}
    return dict(zip(("supervisor", "worker", "successor"), pids, strict=True))


def exists(name: str) -> bool:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module("leanserve." + ".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part, None)
        return found is not None
    return False


@pytest.mark.parametrize("scene", SCENES)
def test_drawn_names_exist(scene: str) -> None:
    assert len(drawing(scene)) >= 10
    for hop in drawing(scene):
        assert exists(hop.name), hop.name


@pytest.mark.parametrize("scene", SCENES)
def test_drawn_calls_happen_in_this_order(scene: str) -> None:
    for role, pid in roles(scene).items():
        calls = iter([name for caller, name in trace(scene) if caller == pid])
        for hop in drawing(scene):
            if hop.role == role:
                # `in` reads on: what is left are the calls behind this one
                assert hop.name in calls, f"{hop.name} is not called behind those that stand above it"


@pytest.mark.fastpath
@pytest.mark.parametrize("scene", SCENES)
def test_what_else_is_named_is_called(scene: str) -> None:
    called = {name for _, name in trace(scene)}
    named = also_called(scene)
    assert len(named) >= 4
    for name in named:
        assert exists(name), name
        if name != "protocol.http1.Http1Codec._read_strictly" or scene != "request":
            assert name in called, name


def test_a_wrong_drawing_is_seen() -> None:
    text = "   the loop          transport/\n                   connection.py\n"
    text += "                    Connection\n"
    text += "      |                   |\n      |-- data_received ->|\n      |                   |* gone\n"
    assert [hop.name for hop in _hops(text)] == [
        "transport.connection.Connection.data_received",
        "transport.connection.Connection.gone",
    ]
    assert not exists("transport.connection.Connection.gone")
