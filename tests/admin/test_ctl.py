"""``leanserve ctl`` against a real server: what it does, what it says, and its exit code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import wait_until
from leanserve import cli
from leanserve.admin.client import Client
from supervised import APP, Supervised, begin

Ctl = Callable[..., tuple[int, str]]


@pytest.fixture
def ctl(capsys: pytest.CaptureFixture[str]) -> Ctl:
    """Runs a command; its exit code and all that it printed."""

    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(list(arguments))
        out, error = capsys.readouterr()
        assert isinstance(end.value.code, int)
        assert (error == "") is (end.value.code == 0)  # what went wrong is told on stderr
        return end.value.code, out + error

    return run


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Supervised]:
    (tmp_path / "served_app.py").write_text(APP)
    settings = {"workers": 2, "log_level": "info"}
    it = Supervised("served_app:app", tmp_path, settings, entry="leanserve.worker.process:main")
    with it:
        it.wait_ready(2)
        yield it
        if it.running.poll() is None:
            assert it.stop() == 0


def pids(it: Supervised, folder: Path) -> set[int]:
    return {worker["pid"] for worker in Client(str(folder / f"{it.pid}.sock")).status()["workers"]}


def test_status(server: Supervised, ctl: Ctl) -> None:
    code, text = ctl("ctl", "status")
    assert code == 0
    assert text.startswith("leanserve ")
    assert "2 of 2 workers ready" in text
    code, text = ctl("ctl", "status", "--json", "--pid", str(server.pid))
    assert (code, json.loads(text)["server"]["pid"]) == (0, server.pid)


def test_workers(server: Supervised, ctl: Ctl, runtime_directory: Path) -> None:
    for _ in range(2):
        assert ctl("ctl", "workers", "3") == (0, "3 workers\n")
    wait_until(lambda: len(pids(server, runtime_directory)) == 3, 10, "three workers")
    assert len(server.lines("adding worker")) == 1
    assert ctl("ctl", "workers", "1000")[0] == 1


def test_reload_waits_for_the_last(server: Supervised, ctl: Ctl, runtime_directory: Path) -> None:
    before = pids(server, runtime_directory)
    assert ctl("ctl", "reload", "--wait") == (0, "replaced 2 workers\n")
    assert not before & pids(server, runtime_directory)
    assert ctl("ctl", "reload")[0] == 0


def test_a_reload_that_fails_is_told(server: Supervised, ctl: Ctl, runtime_directory: Path) -> None:
    before = pids(server, runtime_directory)
    (server.folder / "served_app.py").write_text("raise ValueError('no weights')")
    code, text = ctl("ctl", "reload", "--wait")
    assert (code, "the old workers go on" in text) == (1, True)
    assert pids(server, runtime_directory) == before


def test_abort_ends_a_reload(server: Supervised, ctl: Ctl, runtime_directory: Path) -> None:
    before = pids(server, runtime_directory)
    (server.folder / "served_app.py").write_text("import time\ntime.sleep(600)")
    assert ctl("ctl", "reload")[0] == 0
    wait_until(lambda: len(pids(server, runtime_directory)) == 3, 10, "a successor boots")
    assert ctl("ctl", "abort") == (0, "2 workers not replaced\n")
    assert ctl("ctl", "abort", "--json")[1] == '{"ok": true, "text": "no worker is being replaced"}\n'
    wait_until(lambda: pids(server, runtime_directory) == before, 10, "the successor has left")


def test_stop_waits_for_what_runs(server: Supervised, ctl: Ctl) -> None:
    with begin(server.port, "/wait?1") as running:
        wait_until(lambda: json.loads(ctl("ctl", "status", "--json")[1])["in_flight"] == 1, 10, "it runs")
        assert ctl("ctl", "stop", "--timeout", "0")[0] == 1
        assert ctl("ctl", "drain")[0] == 0
        assert ctl("ctl", "stop") == (0, "stopped\n")
        assert running.recv(65536).startswith(b"HTTP/1.1 200")
    assert server.wait_code() == 0
    code, text = ctl("ctl", "stop")
    assert (code, text.startswith("leanserve: no server of this user")) == (1, True)


def test_stop_now(server: Supervised, ctl: Ctl) -> None:
    with begin(server.port, "/wait?60"):
        wait_until(lambda: json.loads(ctl("ctl", "status", "--json")[1])["in_flight"] == 1, 10, "it runs")
        assert ctl("ctl", "stop", "--now") == (0, "stopped\n")
    assert server.wait_code() == 0


def test_dump(server: Supervised, ctl: Ctl) -> None:
    assert ctl("ctl", "dump", "2") == (0, "stacks of worker 2 go to the log (stderr)\n")
    assert ctl("ctl", "dump") == (0, "stacks of worker 1, 2 go to the log (stderr)\n")
    server.wait_log("most recent call first", 3)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["ctl", "workers"], 2, "ctl workers needs a number"),
        (["ctl", "status", "3"], 2, "ctl status takes no number"),
        (["ctl", "drain", "--wait"], 2, "--wait is for ctl reload and upgrade"),
        (["ctl", "reload", "--now"], 2, "--now is for ctl stop"),
        (["ctl", "nosuch"], 2, "(see leanserve ctl --help)"),
        (["ctl"], 2, "leanserve: ctl needs an order: status, reload, abort, workers, "),
        (["ctl", "status", "--socket", "/nosuch"], 1, "no server answers on /nosuch: No such file"),
        (["top", "--nosuch"], 2, "(see leanserve top --help)"),
    ],
)
def test_what_is_not_done(ctl: Ctl, arguments: list[str], code: int, said: str) -> None:
    found, text = ctl(*arguments)
    assert (found, said in text, text.count("\n")) == (code, True, 1), text


def test_nobody_there_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """A script that reads JSON gets some, whatever has happened."""
    with pytest.raises(SystemExit) as end:
        cli.main(["ctl", "stop", "--json", "--socket", "/nosuch"])
    found = json.loads(capsys.readouterr().out)
    assert (end.value.code, found["ok"], "no server answers on" in found["text"]) == (1, False, True)


@pytest.mark.parametrize("name", ["ctl", "top"])
def test_help(ctl: Ctl, name: str) -> None:
    code, text = ctl(name, "--help")
    assert (code, text.startswith(f"Usage: leanserve {name} ")) == (0, True)


def test_every_order_is_in_the_help(ctl: Ctl) -> None:
    from leanserve.admin.ctl import _ORDERS, HELP

    text: Any = HELP.split("\b\n")[1].split("\n\n")[0]
    assert [line.split()[0] for line in text.splitlines()] == [
        "status", "reload", "abort", "workers", "drain", "stop", "dump", "upgrade",
    ]
    assert set(_ORDERS) == {line.split()[0] for line in text.splitlines()}
