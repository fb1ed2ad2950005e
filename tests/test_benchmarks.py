"""The benchmark runs, all of it; what it measures on a busy machine is nobody's verdict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from benchmarks import clients, peers, proc
from benchmarks.__main__ import run
from benchmarks.clients import frame, plain_frame
from benchmarks.measure import SMOKE, Failure, client_process
from benchmarks.plots import bars
from benchmarks.report import Sample, Spread, Verdict, page, ratio, spread, verdict
from benchmarks.workloads import WORKLOADS, Must
from wsproto.frame_protocol import FrameProtocol, Opcode

from conftest import ServeFactory

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
SVG = "{http://www.w3.org/2000/svg}"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads what only Linux tells")


def runner(*arguments: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True,
        timeout=timeout, check=False,
    )


class TestSmoke:
    """Every workload with every installed server, tiny."""

    @pytest.mark.slow
    @pytest.mark.timeout(200)  # 20 seconds on an idle machine
    def test_everything(self, tmp_path: Path) -> None:
        kept = BENCHMARKS / "RESULTS.md"
        before = kept.read_bytes() if kept.exists() else None
        done = runner("--smoke", "--out", str(tmp_path), "--json", str(tmp_path / "raw.json"), timeout=190)
        assert done.returncode == 0, done.stderr
        held = json.loads((tmp_path / "results.json").read_text())
        assert held == json.loads((tmp_path / "raw.json").read_text())
        assert held["missing"] == []
        measured = {(one["workload"], one["peer"]) for one in held["samples"]}
        absent = held["facts"]["absent"]
        assert measured == {
            (name, peer) for name, row in WORKLOADS.items() for peer in row.peers if peer not in absent
        }
        for one in held["samples"]:
            assert set(one["figures"]) == set(WORKLOADS[one["workload"]].figures)
            # Memory of a few connections may be pages that the server had.
            assert all(value > 0 for name, value in one["figures"].items() if name != "each"), one
        self.check_page((tmp_path / "RESULTS.md").read_text(), absent)
        for name in ("get-cpu", "websocket-cpu", "upload-cpu"):
            assert ElementTree.parse(tmp_path / "plots" / f"{name}.svg").getroot().tag == SVG + "svg"
        assert (kept.read_bytes() if kept.exists() else None) == before

    def check_page(self, text: str, absent: dict[str, list[str]]) -> None:
        for name, row in WORKLOADS.items():
            assert f"### {name}: {row.title}" in text
        for note in (BENCHMARKS / "notes").glob("*.md"):
            assert note.read_text().strip() in text
        if not absent:
            assert "not measured" not in text
            assert text.count("| yes |") + text.count("| **no** |") == sum(
                len(row.musts) for row in WORKLOADS.values()
            )

    def test_reported_again(self, tmp_path: Path) -> None:
        first, second = tmp_path / "first", tmp_path / "second"
        options = ["--smoke", "--only", "get", "--peers", "leanserve,uvicorn-h11", "--out", str(first)]
        assert runner(*options).returncode == 0
        done = runner("--from", str(first / "results.json"), "--only", "get", "--out", str(second))
        assert done.returncode == 0, done.stderr
        assert (second / "RESULTS.md").read_text() == (first / "RESULTS.md").read_text()
        assert "| uvicorn-httptools | <= 0.70 | - | - | not measured |" in done.stdout

    def test_failing_server_does_not_stop_the_rest(self, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = peers.Peer(["python", "-c", "raise SystemExit(3)"], [], [])
        monkeypatch.setitem(peers.PEERS, "granian", broken)
        monkeypatch.setitem(peers.PEERS, "hypercorn", peers.Peer(["no-such-tool"], [], []))
        samples, missing = run(["get"], ["hypercorn", "granian", "leanserve"], 3, SMOKE)
        assert [(one.peer, one.round) for one in samples] == [("leanserve", number) for number in (1, 2, 3)]
        reasons = {(one.peer, one.round): one.reason for one in missing}
        assert set(reasons) == {("granian", 1), ("granian", 2), ("hypercorn", 1), ("hypercorn", 2)}
        assert "exit code 3" in reasons["granian", 1]
        assert "no-such-tool" in reasons["hypercorn", 1]

    @pytest.mark.parametrize(
        ("option", "value"),
        [("--peers", "nobody"), ("--peers", "leanserve,nobody"), ("--only", "get,nobody")],
    )
    def test_unknown(self, option: str, value: str) -> None:
        done = runner(option, value)
        assert done.returncode == 2
        assert "unknown: nobody" in done.stderr


SAMPLES = [
    Sample("get", peer, number, {"cpu": cpu, "rate": 1 / cpu})
    for peer, figures in {
        "leanserve": {1: 10e-6, 2: 30e-6, 3: 20e-6, 4: 70e-6},
        "uvicorn-httptools": {1: 20e-6, 2: 20e-6, 3: 25e-6},
    }.items()
    for number, cpu in figures.items()
]


class TestReport:
    """The figures of these samples, worked out by hand."""

    def test_spread(self) -> None:
        assert spread([3, 1, 10, 2]) == Spread(2.5, 1, 10, 4)
        assert spread([]) is None

    def test_ratio_is_of_the_same_round(self) -> None:
        found = ratio(SAMPLES, "get", "cpu", "leanserve", "uvicorn-httptools")
        assert found is not None
        assert found.rounds == 3, "the fourth round has one side only"
        assert (found.least, found.median, found.most) == pytest.approx((0.5, 0.8, 1.5))
        assert ratio(SAMPLES, "get", "cpu", "leanserve", "granian") is None
        assert ratio(SAMPLES, "ws-64", "cpu", "leanserve", "uvicorn-httptools") is None

    @pytest.mark.parametrize(
        ("figure", "sign", "limit", "holds"),
        [
            ("cpu", "<=", 0.9, True), ("cpu", "<=", 0.7, False),
            ("cpu", "<", 1.0, True), ("cpu", ">=", 1.0, False),
            ("rate", ">=", 1.2, True), ("rate", ">=", 1.3, False),
        ],
    )
    def test_verdict(self, figure: str, sign: str, limit: float, holds: bool) -> None:
        must = Must(figure, "uvicorn-httptools", sign, limit)
        assert verdict(SAMPLES, "get", must).holds is holds

    def test_limit_itself(self) -> None:
        samples = [Sample("get", "leanserve", 1, {"cpu": 1.0}), Sample("get", "granian", 1, {"cpu": 1.0})]
        assert verdict(samples, "get", Must("cpu", "granian", "<=", 1.0)).holds is True
        assert verdict(samples, "get", Must("cpu", "granian", "<", 1.0)).holds is False

    def test_not_measured_does_not_hold(self) -> None:
        must = Must("cpu", "granian", "<", 1.0)
        assert verdict(SAMPLES, "get", must) == Verdict("get", must, None, None)

    def test_page(self, tmp_path: Path) -> None:
        (tmp_path / "b.md").write_text("## Kept by hand\n\nSeed 7.\n")
        facts = {
            "command": "python -m benchmarks", "date": "today", "commit": "", "cpu": "a processor", "cpus": 2,
            "kernel": "Linux 6", "python": "CPython 3", "load_before": 0.5, "rounds": 4, "seconds": 1.0,
            "idle": 9, "versions": {"leanserve": "0.1"}, "absent": {"granian": ["granian"]},
            "workloads": ["get", "ws-64"],
        }
        text = page(facts, SAMPLES, [], tmp_path, ["get-cpu"])
        assert "0 of 6 hold, 5 were not measured." in text
        assert "| uvicorn-httptools | <= 0.70 | 0.80 | 0.50..1.50 | **no** |" in text
        assert "| leanserve | 25.0 (10.0..70.0) | 1 |" in text
        assert "- granian: granian not installed" in text
        assert text.endswith("## Kept by hand\n\nSeed 7.\n")
        assert "### ws-64" not in text

    def test_every_must_can_be_measured(self) -> None:
        for name, row in WORKLOADS.items():
            for must in row.musts:
                assert {must.peer, must.subject} <= set(row.peers), name
                assert must.figure in row.figures, name
            assert set(row.peers) <= set(peers.PEERS), name


def test_bars() -> None:
    rows = [("two", Spread(2, 1, 4, 3)), ("leanserve", Spread(1, 1, 1, 3))]
    root = ElementTree.fromstring(bars("a < b", "c & d", rows))
    rectangles = root.findall(SVG + "rect")
    assert [one.get("class") for one in rectangles] == ["bar own", "bar"], "the smallest first"
    own, other = (float(one.get("width", "0")) for one in rectangles)
    assert other == pytest.approx(2 * own, rel=0.01)
    ends = [(float(one.get("x1", "0")), float(one.get("x2", "0"))) for one in root.findall(SVG + "line")]
    assert ends[1][1] - ends[1][0] == pytest.approx(3 * own, rel=0.01)
    assert max(high for _, high in ends) < float(root.get("width", "0"))
    assert {"a < b", "c & d", "two", "1.0", "2.0"} <= {one.text for one in root.findall(SVG + "text")}


def work(kind: str, port: int, seconds: float, **options: object) -> dict[str, float]:
    """One piece of work by a client, in a process of its own as in a measurement."""
    with client_process(kind, port, options) as client:
        return client.work(seconds)


class TestClients:
    """Against a real server: what they count is what happened."""

    @pytest.fixture
    def port(self, serve: ServeFactory) -> int:
        return serve("benchmarks.app:app", environment={"PYTHONPATH": str(ROOT)}).port

    @pytest.mark.parametrize(
        "options",
        [
            {"connections": 3}, {"connections": 3, "depth": 16}, {"connections": 2, "request": "different"},
            {"connections": 2, "request": "/events?count=5", "units": 5},
        ],
    )
    def test_http(self, port: int, options: dict[str, int]) -> None:
        done = work("http", port, 0.05, **options)
        units = options.get("depth", 1) * options.get("units", 1)
        assert done["count"] >= options["connections"] * units
        assert done["count"] % units == 0
        assert done["seconds"] >= 0.05

    def test_no_line_comes_twice(self) -> None:
        first, second = (clients.DIFFERENT % ((number,) * 7) for number in (100_000, 100_001))
        assert not set(first.split(b"\r\n")) & set(second.split(b"\r\n")) - {b""}
        assert len(first) == len(second)

    @pytest.mark.parametrize("size", [64, 65536, 70000])
    def test_websocket(self, port: int, size: int) -> None:
        assert work("websocket", port, 0.05, connections=2, size=size, text=size == 64)["count"] >= 2

    @pytest.mark.parametrize("size", [0, 5, 125, 126, 65535, 65536])
    def test_frames(self, size: int) -> None:
        """wsproto reads them as what they are."""
        payload = bytes(number % 251 for number in range(size))
        for wire, is_client in ((frame(payload, 2), False), (plain_frame(payload, 2), True)):
            reader = FrameProtocol(is_client, [])
            reader.receive_bytes(wire)
            frames = list(reader.received_frames())
            assert {one.opcode for one in frames} == {Opcode.BINARY}
            assert b"".join(bytes(one.payload) for one in frames) == payload
            assert frames[-1].message_finished

    def test_transfers(self, port: int, tmp_path: Path) -> None:
        size = 3_000_000
        file = tmp_path / "file"
        file.write_bytes(bytes(size))
        assert work("upload", port, 10, size=size, times=2)["count"] == 6
        for path in (f"/download?bytes={size}", f"/file?path={file}&bytes={size}"):
            assert work("download", port, 10, size=size, path=path, times=2)["count"] == 6

    def test_transfer_ends_with_the_time(self, port: int) -> None:
        size = 1 << 40
        assert 0 < work("upload", port, 0.05, size=size)["count"] < 1e6
        assert 0 < work("download", port, 0.05, size=size, path=f"/download?bytes={size}")["count"] < 1e6

    def test_another_length_is_noticed(self, port: int) -> None:
        with pytest.raises(Failure, match="another length"):
            work("download", port, 1, size=6, path="/download?bytes=5")

    def test_new_connections(self, port: int) -> None:
        assert work("new_connections", port, 0.05, connections=4)["count"] >= 4

    @pytest.mark.parametrize("websockets", [False, True])
    def test_idle(self, port: int, websockets: bool) -> None:
        assert work("idle", port, 0, connections=70, websockets=websockets)["count"] == 70

    def test_closed_ones_are_not_idle(self, serve: ServeFactory) -> None:
        port = serve(
            "benchmarks.app:app", "--keep-alive-timeout", "0.1", environment={"PYTHONPATH": str(ROOT)}
        ).port
        with client_process("idle", port, {"connections": 3}) as client:
            end = time.monotonic() + 20
            while client.work(0)["count"] and time.monotonic() < end:
                time.sleep(0.05)
            assert client.work(0)["count"] == 0

    def test_refusal_is_a_failure(self, port: int) -> None:
        with pytest.raises(Failure, match="not 200"):
            work("http", port, 1, connections=1, request="/\x7f")


class TestProcesses:
    """CPU time and memory of a tree of processes."""

    def test_cpu_and_memory_of_children(self) -> None:
        burn = (
            "import time; data = bytearray(50_000_000); end = time.process_time() + 0.3\n"
            "while time.process_time() < end: pass\n"
        )
        parent = (
            "import subprocess, sys\n"
            f"child = subprocess.Popen([sys.executable, '-c', {burn + 'print(flush=True); input()'!r}])\n"
            "child.wait(); print('ended', flush=True); input()\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdout.readline()
            everyone = proc.tree(process.pid)
            assert len(everyone) == 2
            assert proc.cpu_seconds(process.pid) >= 0.3
            together, alone = proc.memory(everyone), proc.memory({process.pid})
            assert together.rss - alone.rss > 50_000_000
            assert together.uss <= together.pss <= together.rss
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"ended\n"
            assert proc.cpu_seconds(process.pid) >= 0.3, "of a child that has been waited for, too"
            process.stdin.write(b"\n")

    def test_own_clock(self) -> None:
        before = proc.cpu_seconds(os.getpid())
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
        assert proc.cpu_seconds(os.getpid()) - before >= 0.09

    def test_numpy_is_hidden(self) -> None:
        """From leanserve-no-numpy, and from it alone."""
        hidden = peers.PEERS["leanserve-no-numpy"].environment
        for environment, code in ((hidden, 1), ({}, 0)):
            done = subprocess.run(
                [sys.executable, "-c", "import numpy"], env={**os.environ, **environment},
                capture_output=True, timeout=30, check=False,
            )
            assert done.returncode == code
            assert (b"hidden" in done.stderr) is bool(code)
