"""The README tells the truth: its calls are made, and CI runs its test command."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

from harness import Serving

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def _commands(first_word: str) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.startswith(first_word)]


def test_curl_calls(serve: Callable[..., Serving]) -> None:
    server = serve("")
    answers = []
    for line in _commands("curl"):
        command = line.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
        done = subprocess.run(
            [*shlex.split(command), "--fail", "--noproxy", "*", "--max-time", "20"],
            capture_output=True, text=True, timeout=30, check=True,
        )
        answers.append(done.stdout)
    predict, stream, health = answers
    assert json.loads(predict)["label"] == "positive"
    assert stream.count("data:") >= 20
    assert json.loads(health)["status"] == "ok"


def test_ci_runs_the_same_test_command() -> None:
    *_, command = _commands("python3 -m venv")
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    venv, install, run = (" ".join(shlex.split(step)) for step in command.split(" && "))
    lines = [line for line in script.splitlines() if line and not line.startswith("#")]
    assert venv == "python3 -m venv .venv"
    assert lines[-3] == '"$python" -m venv .venv'
    assert " ".join(shlex.split(lines[-2])) == install
    assert lines[-1] == run
