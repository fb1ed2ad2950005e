"""The benchmarks of operations run, and what they tell apart is told apart. No figure of time is judged."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from benchmarks.__main__ import rewrite
from benchmarks.operations import chaos, load, longtail, soak, spread
from benchmarks.operations.client import Ended, connect, get, post
from benchmarks.operations.drawings import lines
from benchmarks.operations.journal import JOURNAL_VARIABLE, Journal
from benchmarks.operations.load import Failure, Killed, Load, Loss, losses
from benchmarks.operations.longtail import quantile
from benchmarks.operations.owners import accepted
from benchmarks.operations.report import section, verdicts
from benchmarks.operations.results import Found
from benchmarks.operations.write import write

from conftest import ServeFactory
from harness import descendants

ROOT = Path(__file__).parents[1]
SVG = "{http://www.w3.org/2000/svg}"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks read what only Linux tells")


def runner(*arguments: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.operations", *arguments], cwd=ROOT, capture_output=True, text=True,
        timeout=timeout, check=False,
    )


# Every part with leanserve alone, tiny


def smoke(part: str, out: Path, *more: str) -> dict[str, dict[str, float]]:
    """A part with leanserve alone, tiny: case to figures."""
    options = ["--smoke", "--only", part, "--peers", "leanserve", "--out", str(out), *more]
    done = runner(*options, timeout=150)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    held = json.loads((out / "operations.json").read_text())[part]["found"]
    assert {one["server"] for one in held} == {"leanserve"}
    return {one["case"]: one["figures"] for one in held}


@pytest.mark.slow
@pytest.mark.timeout(160)
def test_spread(tmp_path: Path) -> None:
    found = smoke("spread", tmp_path)
    assert set(found) == set(spread.CASES)
    for figures in found.values():
        assert (figures["answered"], figures["failed"]) == (200, 0)
        assert figures["ratio"] == figures["busiest"] / figures["idlest"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(160)
def test_longtail(tmp_path: Path) -> None:
    found = smoke("longtail", tmp_path)
    assert set(found) == {*longtail.ROWS, longtail.AT_ONCE}
    assert found[longtail.AT_ONCE]["trials"] == 1
    for case in longtail.ROWS:
        assert found[case]["failed"] == 0
        assert 0 < found[case]["p50"] <= found[case]["p90"] <= found[case]["p99"] <= found[case]["max"]
    assert (tmp_path / "plots" / "tail-pool.svg").exists()


@pytest.mark.slow
@pytest.mark.timeout(160)
@pytest.mark.parametrize("case", ["kill", "roll", "workers"])
def test_chaos(tmp_path: Path, case: str) -> None:
    """Nothing is lost but what was in flight on a killed worker."""
    figures = smoke("chaos", tmp_path, "--cases", case)[case]
    assert figures["acts"] >= 1
    assert figures["answered"] > 100
    assert figures["at fault"] == 0, figures


@pytest.mark.slow
@pytest.mark.timeout(160)
@pytest.mark.parametrize("case", ["haproxy", "nginx"])
def test_chaos_behind_a_proxy(tmp_path: Path, case: str) -> None:
    from proxies import find

    find(case)
    figures = smoke("chaos", tmp_path, "--cases", case)[case]
    assert figures["acts"] >= 1
    assert figures["at fault"] == 0, figures


@pytest.mark.slow
@pytest.mark.timeout(160)
@pytest.mark.parametrize("case", ["supervisor", "socket"])
def test_chaos_of_the_supervisor(tmp_path: Path, case: str) -> None:
    """A new one comes up; nobody is refused where the listening socket is not the supervisor's own."""
    figures = smoke("chaos", tmp_path, "--cases", case)[case]
    assert figures["acts"] >= 1
    assert figures["answered"] > 100
    if case == "socket":
        assert figures.get(Loss.REFUSED, 0) == 0


@pytest.mark.slow
@pytest.mark.timeout(160)
def test_upgrade_is_left_out_where_it_is_not_known(tmp_path: Path) -> None:
    done = runner("--smoke", "--only", "chaos", "--cases", "upgrade", "--peers", "leanserve", timeout=150)
    if done.returncode:
        assert "does not know SIGUSR2" in done.stderr
    else:
        assert "upgrade, leanserve: seconds" in done.stderr
        assert "at fault 0," in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(160)
def test_soak(tmp_path: Path) -> None:
    found = smoke("soak", tmp_path)
    assert set(found) == {soak.LOAD, soak.SUPERVISOR, *(f"worker {number}" for number in range(1, 5))}
    figures = found[soak.LOAD]
    assert figures["failed"] == 0, figures
    assert figures["replaced"] == 0
    assert all(figures[f"done: {client}"] > 0 for client in soak.CLIENTS)
    assert figures["tasks after"] <= figures["tasks before"], "clients that have gone left tasks behind"
    for metric in soak.METRICS:
        assert found["worker 1"][f"{metric} first"] > 0
    for name in ("soak-rss", "soak-tasks"):
        assert ElementTree.parse(tmp_path / "plots" / f"{name}.svg").getroot().tag == SVG + "svg"


@pytest.mark.parametrize(
    ("option", "value"), [("--peers", "nobody"), ("--only", "spread,nothing"), ("--cases", "flood")]
)
def test_unknown(option: str, value: str) -> None:
    done = runner(option, value)
    assert done.returncode == 2
    assert "unknown: " in done.stderr


# The client, against a real server


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal(tmp_path / "journal")
    yield made
    made.close()


def test_journal(serve: ServeFactory, journal: Journal) -> None:
    """It says which process began a request, and how often; and nothing of those that nobody began."""
    environment = {"PYTHONPATH": str(ROOT), JOURNAL_VARIABLE: str(journal.path)}
    server = serve("benchmarks.operations.app:app", "--workers", "2", environment=environment)

    async def ask() -> int:
        link = await connect(server.port)
        for number in (3, 5, 5):
            answer = await link.ask(post(f"/work?id={number}&ms=1", b"%d" % number))
            assert (answer.status, answer.body) == (200, b"%d" % number)
        link.close()
        return answer.pid

    pid = asyncio.run(ask())
    assert pid in descendants(server.pid)
    assert [journal.begun(number) for number in (2, 3, 4, 5)] == [(0, 0), (pid, 1), (0, 0), (pid, 2)]


def test_source_and_end(serve: ServeFactory) -> None:
    """From the address that was asked for; an answer that is not complete is no answer."""
    server = serve("benchmarks.operations.app:app", environment={"PYTHONPATH": str(ROOT)})

    async def ask() -> None:
        link = await connect(server.port, ("127.0.7.7", 0))
        assert link.address[0] == "127.0.7.7"
        assert (await link.ask(get("/pid"))).last is False
        assert (await link.ask(get("/pid", close=True))).last is True
        await asyncio.wait_for(link.ended.wait(), 20)
        with pytest.raises(Ended):
            await link.ask(get("/pid"))

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("answer", "begun"), [(b"", False), (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhell", True)]
)
def test_ended_says_whether_the_answer_had_begun(answer: bytes, begun: bool) -> None:
    async def ask() -> None:
        async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

        server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
        async with server:
            link = await connect(server.sockets[0].getsockname()[1])
            with pytest.raises(Ended) as caught:
                await link.ask(get("/"))
            assert caught.value.begun is begun

    asyncio.run(ask())


def test_accepted() -> None:
    """Those in the queue are nobody's; those of another port are not meant."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 0)) as other:
        address, elsewhere = listener.getsockname(), other.getsockname()
        with (
            socket.create_connection(address) as first, socket.create_connection(address),
            socket.create_connection(elsewhere), listener.accept()[0], other.accept()[0],
        ):
            assert accepted(os.getpid(), address[1]) == {first.getsockname()}
            assert accepted(os.getppid(), address[1]) == set()


def test_catches() -> None:
    def handled() -> bool:
        return chaos.catches(os.getpid(), signal.SIGUSR2)

    former = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        assert handled()
    finally:
        signal.signal(signal.SIGUSR2, former)
    assert not handled()


# Who is to blame

CLIENT = ("127.0.0.9", 40_000)
KILLED = Killed({7: 10.0}, {CLIENT: 10.0})


def failure(what: Loss = Loss.NEVER_BEGUN, **more: Any) -> Failure:
    facts = {"number": 1, "address": CLIENT, "before": 0, "begun_s": 9.0, "when_s": 10.5, "told": ""}
    return Failure(what=what, **{**facts, **more})


@pytest.mark.parametrize(
    ("begun_by", "found", "loss"),
    [
        (7, failure(), Loss.BEGUN_BY_KILLED),
        (7, failure(Loss.LATE_NEVER_BEGUN), Loss.BEGUN_BY_KILLED),
        (7, failure(when_s=9.9), Loss.CUT),  # it ended before the kill
        (8, failure(), Loss.CUT),
        (8, failure(before=7), Loss.CUT),
        (8, failure(Loss.LATE_NEVER_BEGUN), Loss.LATE_BEGUN),
        (0, failure(Loss.LATE_NEVER_BEGUN), Loss.LATE_NEVER_BEGUN),
        (0, failure(), Loss.ACCEPTED_BY_KILLED),
        (0, failure(address=("127.0.0.8", 40_000)), Loss.NEVER_BEGUN),
        (0, failure(begun_s=10.1), Loss.NEVER_BEGUN),  # a later connection from the same address
        (0, failure(when_s=9.9), Loss.NEVER_BEGUN),
        (0, failure(before=7), Loss.KEPT_BY_KILLED),
        (0, failure(before=7, when_s=9.9), Loss.REUSE_RACE),
        (0, failure(before=8), Loss.REUSE_RACE),
        (7, failure(Loss.REFUSED), Loss.REFUSED),
        (7, failure(Loss.SERVER_ERROR), Loss.SERVER_ERROR),
        (7, failure(Loss.WRONG), Loss.WRONG),
    ],
)
def test_judge(journal: Journal, begun_by: int, found: Failure, loss: Loss) -> None:
    if begun_by:
        journal._entries[8:16] = begun_by.to_bytes(4, "little") + (1).to_bytes(4, "little")
    assert KILLED.judge(found, journal) is loss


def test_a_lost_queue_is_a_fault(journal: Journal) -> None:
    """A server that closes its listening socket while clients stand in its queue is found out."""
    assert set(Loss) - load.OF_THE_KILLED >= {Loss.NEVER_BEGUN, Loss.REFUSED, Loss.REUSE_RACE, Loss.CUT}

    async def ask() -> Counter[Loss]:
        with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
            port = listener.getsockname()[1]
            clients = Load(port)
            running = asyncio.create_task(clients.run())
            end = time.monotonic() + 20
            while not established(port) and time.monotonic() < end:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        clients.stop()
        await running
        return losses(clients, Killed(), journal)

    found = asyncio.run(ask())
    assert found[Loss.NEVER_BEGUN] >= 1, found
    assert found[Loss.REFUSED] >= 1, found


def established(port: int) -> int:
    """Connections to a port of 127.0.0.1 that nobody has accepted yet, of 20 or more."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    waiting = sum(row[1] == f"0100007F:{port:04X}" and row[3] == "01" for row in rows)
    return waiting if waiting >= 20 else 0


# Figures and pages


def test_sources() -> None:
    found = list(islice(spread.sources(1), 10_000))
    assert len(set(found)) == 10_000
    assert len({port for _, port in found}) == spread.SOURCE_PORTS >= 200
    assert all(address.startswith("127.1.") for address, _ in found)


def test_quantile() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile([4.0], 0.99)) == (51.0, 100.0, 4.0)


def test_arrivals_are_the_same_for_all_and_at_the_rate() -> None:
    row = longtail.ROWS["block 50% pool"]
    first, second = (list(longtail._Load(0, row, 5)._plan(20.0)) for _ in range(2))
    assert first == second
    assert row.rate == 400
    assert all(early[0] < late[0] < 20 for early, late in pairwise(first))
    # 8000 are expected, with a standard deviation of 89, and 800 slow ones, of 27.
    assert abs(len(first) - 8000) < 500
    assert abs(sum(slow for _, slow in first) - 800) < 150


def test_trend() -> None:
    times = [float(number) for number in range(9)]
    told = soak.trend(times, [1, 1, 1, 2, 3, 4, 5, 6, 7])
    assert (told["first"], told["last"], told["most"]) == (1, 6, 7)
    assert math.isclose(told["slope"], 3600)
    assert soak.trend([0.0], [5.0]) == {"first": 5, "last": 5, "most": 5}


@pytest.mark.parametrize(("last", "flat"), [(100.0, True), (113.0, True), (113.1, False), (50.0, True)])
def test_flat(last: float, flat: bool) -> None:
    assert soak.is_flat("fds", {"fds first": 100.0, "fds last": last}) is flat


FACTS = {
    "command": "python -m benchmarks.operations", "date": "today", "commit": "", "cpu": "a processor",
    "cpus": 2, "kernel": "Linux 6", "python": "CPython 3", "load_before": 0.5,
    "versions": {"leanserve": "0.1"},
}


def part(*found: Found) -> dict[str, Any]:
    return {"facts": FACTS, "found": [one.as_json() for one in found]}


def of_spread(ratio: float, failed: float = 0) -> Found:
    figures = {"ratio": ratio, "busiest": 10 * ratio, "idlest": 10, "answered": 40, "failed": failed}
    return Found("spread", "held", "leanserve", figures=figures)


@pytest.mark.parametrize(("ratio", "failed", "holds"), [(1.3, 0, True), (1.31, 0, False), (1.0, 1, False)])
def test_verdict_of_the_spread(ratio: float, failed: float, holds: bool) -> None:
    ((_, must, measured, found),) = verdicts({"spread": part(of_spread(ratio, failed))})
    assert (must, measured, found) == ("<= 1.3", f"{ratio:.2f}", holds)


def test_verdict_of_the_long_tail_is_of_the_same_round() -> None:
    case = "block 50% connection each"
    found = [
        Found("longtail", key, server, number, {"p99": p99, "failed": 0})
        for key in (case, "block 50% pool")  # of kept connections nothing is asked
        for server, values in {"leanserve-shared": {1: 0.1, 2: 0.3}, "granian": {1: 0.2, 3: 0.1}}.items()
        for number, p99 in values.items()
    ]
    (one,) = verdicts({"longtail": part(*found)})
    what = f"long tail, --accept shared: {case}, p99 / that of granian"
    assert one == (what, "<= 1.10", "0.50 (0.50..0.50)", True)


def test_page_and_kept_parts(tmp_path: Path) -> None:
    """A part that is measured again replaces itself and no other."""
    write(tmp_path, {"spread": part(of_spread(2.0))})
    chaos_found = Found("chaos", "upgrade", "leanserve", reason="does not know SIGUSR2")
    write(tmp_path, {"chaos": part(chaos_found)})
    write(tmp_path, {"spread": part(of_spread(1.1))})
    text = (tmp_path / "OPERATIONS.md").read_text()
    assert "| leanserve | - | - | 1.10 (11 / 10) | 0 |" in text
    assert "2.00" not in text
    assert "- not measured: upgrade, leanserve: does not know SIGUSR2" in text
    assert "1 of 1 hold." in text
    assert text == "\n".join(section(json.loads((tmp_path / "operations.json").read_text()))) + "\n"


def test_section_of_the_results(tmp_path: Path) -> None:
    """Where the other benchmarks have results, the section stands among them, and a new page keeps it."""
    (tmp_path / "results.json").write_text((ROOT / "benchmarks" / "results.json").read_text())
    rewrite(tmp_path)
    before = (tmp_path / "RESULTS.md").read_text()
    assert "## Operations" not in before
    write(tmp_path, {"spread": part(of_spread(1.1))})
    after = (tmp_path / "RESULTS.md").read_text()
    assert "## Operations\n" in after
    assert set(before.splitlines()) <= set(after.splitlines())
    assert not (tmp_path / "OPERATIONS.md").exists()
    rewrite(tmp_path)
    assert (tmp_path / "RESULTS.md").read_text() == after


def test_lines() -> None:
    root = ElementTree.fromstring(lines("a < b", "c & d", {"one": [(0, 5), (10, 10)], "two": [(5, 0)]}))
    first, second = (one.get("points", "") for one in root.findall(SVG + "polyline"))
    (left, middle), (right, top) = (map(float, pair.split(",")) for pair in first.split())
    assert left < right
    assert top < middle
    (other,) = (tuple(map(float, pair.split(","))) for pair in second.split())
    assert other[0] == pytest.approx((left + right) / 2)
    assert middle == pytest.approx((top + other[1]) / 2)
    assert {"a < b", "c & d", "one", "two", "10 s"} <= {one.text for one in root.findall(SVG + "text")}
