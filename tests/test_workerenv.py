"""leanserve.workerenv: which worker gets which value, and that the application's import sees it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from harness import wait_until
from leanserve.configfile import read_config
from leanserve.errors import SettingsError
from leanserve.settings import Settings
from leanserve.workerenv import SLOT_VARIABLE, environment_of
from supervised import Supervised, get

REAL = "leanserve.worker.process:main"

# What stood in the environment while the module was imported.
APP = """
import json, os
AT_IMPORT = {name: os.environ.get(name) for name in ("LEANSERVE_WORKER", "GPU", "HOME_OF_MODEL")}

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    body = json.dumps([os.getpid(), AT_IMPORT]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
"""


@pytest.mark.parametrize(
    ("lines", "slot", "found"),
    [
        ((), 0, {}),
        ((), 7, {}),
        (("A=x",), 3, {"A": "x"}),
        (("A=x;y",), 0, {"A": "x"}),
        (("A=x;y",), 1, {"A": "y"}),
        (("A=x;y",), 2, {"A": "x"}),
        (("A=x;;z",), 1, {"A": ""}),
        (("A=",), 1, {"A": ""}),
        (("A=b=c;d, e",), 1, {"A": "d, e"}),
        (("A=0;1;2", "B=0;1"), 5, {"A": "2", "B": "1"}),
    ],
)
def test_values(lines: tuple[str, ...], slot: int, found: dict[str, str]) -> None:
    assert environment_of(lines, slot) == {**found, SLOT_VARIABLE: str(slot)}
    assert Settings.build(worker_env=lines).pool.worker_env == lines


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("A",), "must be NAME=A;B;C"),
        (("=1",), "must be NAME=A;B;C"),
        (("A B=1",), "must be NAME=A;B;C"),
        (("1A=1",), "must be NAME=A;B;C"),
        (("A=\0",), "must be NAME=A;B;C"),
        (("A=1", "B=2", "A=3"), "A is given twice"),
        (("LEANSERVE_WORKER=1",), "not to be set"),
    ],
)
def test_bad_lines(lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings.build(worker_env=lines)


def test_threads_have_one_environment() -> None:
    Settings.build(worker_env=("A=1",), worker_kind="thread")
    with pytest.raises(SettingsError, match="worker_env B: threads have one environment"):
        Settings.build(worker_env=("A=1", "B=1;2"), worker_kind="thread")


def test_a_table_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "leanserve.toml"
    file.write_text('[worker_env]\nGPU = ["0", "1"]\nNAME = "x"\n')
    assert read_config(str(file)).values["worker_env"] == ("GPU=0;1", "NAME=x")
    file.write_text('worker_env = ["GPU=0;1"]\n')
    assert read_config(str(file)).values["worker_env"] == ("GPU=0;1",)


@pytest.mark.parametrize("value", ["[0, 1]", '["0;1"]', "[]", "1"])
def test_a_bad_table_in_a_file(tmp_path: Path, value: str) -> None:
    file = tmp_path / "leanserve.toml"
    file.write_text(f"[worker_env]\nGPU = {value}\n")
    with pytest.raises(SettingsError, match=r'worker_env: GPU: write texts without ";"'):
        read_config(str(file))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_set_before_the_import_and_kept_on_respawn(tmp_path: Path, method: str) -> None:
    (tmp_path / "env_app.py").write_text(APP)
    lines = ["GPU=a;b", "HOME_OF_MODEL=/x"]
    with Supervised(
        "env_app:app", tmp_path, {"workers": 3, "worker_env": lines, "start_method": method}, entry=REAL
    ) as it:
        it.wait_ready(3)
        first = seen(it, 3)
        assert {slot: values["GPU"] for slot, (_, values) in first.items()} == {"0": "a", "1": "b", "2": "a"}
        assert {values["HOME_OF_MODEL"] for _, values in first.values()} == {"/x"}
        os.kill(first["1"][0], signal.SIGKILL)
        it.wait_ready(4)
        wait_until(lambda: seen(it, 3)["1"][0] != first["1"][0], 10, "an answer of the successor")
        assert seen(it, 3)["1"][1] == first["1"][1]
        assert it.stop() == 0


def seen(it: Supervised, count: int) -> dict[str, tuple[int, dict[str, str]]]:
    """By slot, the pid and what was in the environment at import; of so many different workers."""
    found: dict[str, tuple[int, dict[str, str]]] = {}

    def enough() -> bool:
        pid, values = json.loads(get(it.port))
        found[values["LEANSERVE_WORKER"]] = pid, values
        return len(found) >= count

    wait_until(enough, 20, f"answers of {count} workers, so far {found}")
    return found
