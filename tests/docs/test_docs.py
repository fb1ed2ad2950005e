"""The documents say what the code says: lists and tables compared, blocks executed."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
from enum import IntEnum
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from docs.documents import DOCS, ROOT, Block, blocks, code, pages, read, table
from harness import free_port, wait_until
from leanserve.cli import settings_from
from leanserve.command import build_command
from leanserve.configfile import FILES, read_config
from leanserve.machine import Machine
from leanserve.settings import Settings

PACKAGE = ROOT / "src" / "leanserve"

# What a block may be, besides python and console; those are not run, each for its reason.
NOT_RUN = {
    "": "a drawing or a list",
    "mermaid": "a drawing, compared with the tables it is made from",
    "sequence request": "played by test_flow.py",
    "sequence websocket": "played by test_flow.py",
    "sequence death": "played by test_flow.py",
    "sequence roll": "played by test_flow.py",
    "nginx": "run by tests/e2e/test_proxies.py",
    "haproxy": "run by tests/e2e/test_proxies.py",
    "yaml model.yaml": "run by tests/e2e/test_kubernetes.py",
    "yaml prometheus.yml": "read by tests/e2e/test_prometheus.py",
    "yaml leanserve.rules.yml": "read by tests/e2e/test_prometheus.py",
    "yaml adapter.yaml": "read by tests/e2e/test_kubernetes.py",
    "systemd sentiment.service": "looked at by tests/e2e/test_systemd.py",
    "systemd sentiment.socket": "looked at by tests/e2e/test_systemd.py",
}


def blocks_of(*kinds: str) -> list[pytest.param]:
    return [
        pytest.param(page, block, id=f"{page.relative_to(ROOT)}:{block.line}")
        for page in pages()
        if page != ROOT / "README.md"  # see below
        for block in blocks(page.read_text(encoding="utf-8"))
        if block.kind in kinds
    ]


# design.md


def _listed() -> set[str]:
    """The modules of the folder list, as paths without suffix."""
    (tree,) = (block.text for block in blocks(read("explain/design.md")) if block.text.startswith("src/"))
    found, folder = set(), ""
    for line in tree.splitlines()[1:]:
        names = re.split(r"\s{2,}L\d ", line)[0]
        if not line.startswith(" " * 10):
            folder = names.split()[0] if names.split()[0].endswith("/") else ""
        found |= {folder + name for name in names.split() if not name.endswith("/")}
    return found


def test_folder_list() -> None:
    files = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")}
    assert _listed() == {name for name in files if not name.endswith("__init__")}


def test_folder_list_names_every_folder() -> None:
    folders = {path.parent.name for path in PACKAGE.rglob("__init__.py")} - {"leanserve"}
    (tree,) = (block.text for block in blocks(read("explain/design.md")) if block.text.startswith("src/"))
    assert set(re.findall(r"^  (\w+)/", tree, re.MULTILINE)) == folders


def _states() -> dict[str, list[str]]:
    rows = table(read("explain/design.md"), "machine", "enum", "states")
    return {code(enum): states.split(", ") for _, enum, states in rows}


@pytest.mark.parametrize("name", _states())
def test_table_of_states(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    enum = getattr(importlib.import_module(f"leanserve.{module}"), attribute)
    assert issubclass(enum, IntEnum)
    assert _states()[name] == [state.name for state in enum]


def test_table_of_states_has_every_machine() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.stem != "__main__":
            module = path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".")
            importlib.import_module(module.removesuffix(".__init__"))
    kinds = [kind for kind in Machine.__subclasses__() if kind.__module__.startswith("leanserve.")]
    enums = {type(kind.START) for kind in kinds}
    names = {f"{enum.__module__}.{enum.__qualname__}".removeprefix("leanserve.") for enum in enums}
    assert set(_states()) == names


# Pages made from the code


@pytest.mark.parametrize("script", ["make_diagrams.py", "make_settings.py"])
def test_made_pages_are_fresh(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(DOCS / script), "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_index_names_every_page() -> None:
    index = read("index.md")
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).as_posix()
        assert name == "index.md" or f"({name})" in index, name


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if "://" not in target:
            assert (page.parent / target).exists(), target


# Blocks


def test_every_block_is_run_or_has_a_reason() -> None:
    for page in pages():
        if page != ROOT / "README.md":
            for block in blocks(page.read_text(encoding="utf-8")):
                known = ("python", "console", "toml", *NOT_RUN)
                assert block.kind in known, f"{page}:{block.line} {block.kind}"


@pytest.mark.parametrize(("page", "block"), blocks_of("python"))
def test_python_block(page: Path, block: Block, tmp_path: Path) -> None:
    """Each in an interpreter of its own, so that none leans on another."""
    script = tmp_path / "block.py"
    script.write_text(block.text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, f"{page}:{block.line}\n{done.stderr}"


class Shell:
    """Runs the lines of one console block: ``$ command``, then what it prints (``...`` is anything)."""

    def __init__(self, log: Path, folder: Path = ROOT) -> None:
        self.log = log
        self.folder = folder
        self.port = free_port()
        self.server: subprocess.Popen[bytes] | None = None

    def run(self, text: str) -> None:
        """All of the block. AssertionError when a command fails or prints something else."""
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            command = command.replace("8000", str(self.port))
            if command.endswith(" &"):
                self.start(command.removesuffix(" &"))
            else:
                self._run(command, expected)

    def _environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"}

    def start(self, command: str) -> None:
        """Start a server and wait until it listens."""
        assert self.server is None, "one server per block"
        with self.log.open("wb") as output:
            self.server = subprocess.Popen(
                f"exec {command}", shell=True, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, env=self._environment(), start_new_session=True,
            )  # fmt: skip
        wait_until(lambda: "listening on" in self.log.read_text(), 30, f"{command} listens")

    def _run(self, command: str, expected: str) -> None:
        if "$!" in command:
            assert self.server is not None
            command = command.replace("$!", str(self.server.pid))
        done = subprocess.run(
            command, shell=True, cwd=self.folder, capture_output=True, text=True, timeout=55,
            env=self._environment(),
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        glob = re.sub(r"([\[\]?*])", r"[\1]", expected.strip()).replace("...", "*")
        assert fnmatchcase(done.stdout.strip(), glob), f"{command}\n{done.stdout}\nis not\n{expected}"

    def close(self) -> None:
        """End the server; it has to go in an orderly way."""
        if self.server is not None:
            try:
                if self.server.poll() is None:
                    self.server.send_signal(signal.SIGTERM)
                assert self.server.wait(20) == 0, self.log.read_text()
            finally:
                if self.server.poll() is None:
                    os.killpg(self.server.pid, signal.SIGKILL)  # a session of its own: these are ours alone
                    self.server.wait(10)


@pytest.mark.parametrize(("page", "block"), blocks_of("console"))
def test_console_block(page: Path, block: Block, tmp_path: Path) -> None:
    above = [found for found in blocks(page.read_text(encoding="utf-8")) if found.line < block.line]
    files = [found for found in above if found.kind == "toml"]
    for file in files:
        (tmp_path / _name_of(file)).write_text(file.text, encoding="utf-8")
    shell = Shell(tmp_path / "server.log", tmp_path if files else ROOT)
    try:
        shell.run(block.text)
    finally:
        shell.close()


def _name_of(block: Block) -> str:
    """A settings file says in its first line how it is called."""
    name = block.text.partition("\n")[0].removeprefix("# ")
    assert name in FILES, f"line {block.line} has to begin with '# leanserve.toml' or '# pyproject.toml'"
    return name


@pytest.mark.parametrize(("page", "block"), blocks_of("toml"))
def test_settings_file(page: Path, block: Block, tmp_path: Path) -> None:
    file = tmp_path / _name_of(block)
    file.write_text(block.text, encoding="utf-8")
    found = read_config(str(file))
    assert found.app is not None or found.values


# The README: its curl calls and its test command are run by tests/test_readme.py

README = (ROOT / "README.md").read_text(encoding="utf-8")
STARTS = re.findall(r"^python -m leanserve (.*)$", README, re.MULTILINE)


@pytest.mark.parametrize("arguments", STARTS)
def test_readme_start_commands_are_understood(arguments: str) -> None:
    context = build_command().make_context("leanserve", shlex.split(arguments))
    given = {name: value for name, value in context.params.items() if name != "app"}
    assert context.params["app"]
    assert settings_from(given, {}) != Settings()


def test_readme_python_blocks_serve(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("async def app(scope, receive, send): pass\n")
    found = [block for block in blocks(README) if block.kind == "python"]
    assert found
    for block in found:
        assert "port=8000" in block.text
        script = tmp_path / "block.py"
        script.write_text(block.text.replace("port=8000", f"port={free_port()}"), encoding="utf-8")
        shell = Shell(tmp_path / "server.log", tmp_path)
        try:
            shell.start(f"{sys.executable} {script}")
        finally:
            shell.close()
