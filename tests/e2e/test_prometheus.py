"""The files of docs/howto/prometheus.md, and what /metrics says, as Prometheus' own tool reads them."""

from __future__ import annotations

import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest
import yaml

from docs.documents import blocks, read, table
from harness import Serving, free_port

PAGE = {block.kind: block.text for block in blocks(read("howto/prometheus.md"))}
FILES = {kind.partition(" ")[2]: text for kind, text in PAGE.items() if kind.startswith("yaml ")}
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool (Debian: prometheus)")


def promtool(*arguments: str, stdin: str = "") -> tuple[int, str]:
    """Exit code, and all that it says."""
    done = subprocess.run(
        [str(PROMTOOL), *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_the_rules_ask_for_metrics_that_exist() -> None:
    known = dict(row[:2] for row in table(read("howto/prometheus.md"), "metric", "kind", "what"))
    kinds = {name.strip("`"): kind for name, kind in known.items()}
    rules = yaml.safe_load(FILES["leanserve.rules.yml"])["groups"][0]["rules"]
    assert rules
    for rule in rules:
        (name,) = re.findall(r"leanserve_\w+", rule["expr"])
        ending = name.rpartition("_")[2]
        kind = {"bucket": "histogram", "total": "counter"}.get(ending, "gauge")
        assert kinds[name.removesuffix("_bucket")] == kind
    config = yaml.safe_load(FILES["prometheus.yml"])
    assert config["rule_files"] == ["leanserve.rules.yml"]


@needs_promtool
@pytest.mark.parametrize("broken", [False, True])
def test_the_files(tmp_path: Path, broken: bool) -> None:
    """That it can say no is shown by an expression that is none."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text.replace("increase(", "increase((") if broken else text)
    code, said = promtool("check", "config", str(tmp_path / "prometheus.yml"))
    assert (code != 0) is broken, said


@needs_promtool
def test_what_a_server_says(tmp_path: Path) -> None:
    admin = f"127.0.0.1:{free_port()}"
    with Serving("", tmp_path / "log", ["--admin", admin, "--workers", "2"]) as server:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=20) as answer:
            answer.read()
        with urllib.request.urlopen(f"http://{admin}/metrics", timeout=20) as answer:
            text = answer.read().decode()
    assert promtool("check", "metrics", stdin=text) == (0, "")
    assert promtool("check", "metrics", stdin=text.replace("# HELP leanserve_ready", "# NONE"))[0] != 0
