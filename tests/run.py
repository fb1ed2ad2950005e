"""Every gate, one command: `python tests/run.py [pytest arguments]`. Exit status 0 when all of them pass.

Run it with the interpreter of the project's virtual environment. It installs what only the tests need and pip
does not have, into .dev/: the npm client `ws`, where npm is; the Autobahn testsuite, where Python 2.7 is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GATES = {
    "ruff": ["ruff", "check", "src", "tests", "benchmarks"],
    "mypy": ["mypy"],
    "import contract": ["lint-imports"],
}


def install_node_client() -> None:
    """The `ws` package from the npm registry; tests that need it are skipped without, with the reason."""
    npm = shutil.which("npm")
    if npm is None or (ROOT / ".dev" / "node_modules" / "ws").is_dir():
        return
    command = [npm, "install", "--silent", "--no-fund", "--no-audit", "--prefix", ".dev", "ws@8"]
    try:
        subprocess.run(command, cwd=ROOT, timeout=120, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        print(f"ws was not installed: {error}", flush=True)


def find_python2() -> str | None:
    """A Python 2.7 that runs: Autobahn's testsuite runs on nothing newer."""
    versions = Path.home() / ".pyenv" / "versions"
    found = [*map(str, versions.glob("2.7*/bin/python2.7")), shutil.which("python2.7")]
    for path in found:
        # One of pyenv's shims is there, and fails, when that version is installed but not chosen.
        if path and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
            return path
    return None


def install_autobahn() -> None:
    """The Autobahn testsuite from PyPI; its test is skipped without, with the reason."""
    python2, folder = find_python2(), ROOT / ".dev" / "autobahn"
    if python2 is None or (folder / "bin" / "wstest").is_file():
        return
    tools = ROOT / ".dev" / "tools"
    commands = [
        [sys.executable, "-m", "venv", str(tools)],
        [str(tools / "bin" / "pip"), "install", "-q", "virtualenv==20.21.1"],  # the last that knows 2.7
        [str(tools / "bin" / "python"), "-m", "virtualenv", "-q", "-p", python2, str(folder)],
        [str(folder / "bin" / "pip"), "install", "-q", "autobahntestsuite==25.10.1"],
    ]
    try:
        for command in commands:
            subprocess.run(command, cwd=ROOT, timeout=300, check=True, capture_output=True)
    except (subprocess.SubprocessError, OSError) as error:
        print(f"the Autobahn testsuite was not installed: {error}", flush=True)


# What the tests want of the system: Debian's package, and the names under which it may be there.
SYSTEM = {
    "chromium": ("chromium", "chromium-browser", "google-chrome"),
    "nginx-light": ("nginx",),
    "haproxy": ("haproxy",),
    "systemd": ("systemd-socket-activate",),
    "faketime": ("faketime",),
    "prometheus": ("promtool",),
}


def install_system() -> None:
    """Chromium, nginx and haproxy, in CI only: nobody else wants them installed by a test command."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    missing = [
        package
        for package, names in SYSTEM.items()
        if not any(shutil.which(name, path=path) for name in names)
    ]
    if not (missing and os.environ.get("CI") and os.geteuid() == 0 and shutil.which("apt-get")):
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends"]
    for command in (["apt-get", "update", "--quiet"], *([*install, package] for package in missing)):
        try:
            subprocess.run(
                command, env=environment, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
                timeout=300, check=True,
            )
        except (subprocess.SubprocessError, OSError) as error:
            print(f"not done: {' '.join(command)}: {error}", flush=True)


def run(name: str, command: list[str]) -> bool:
    """Run one gate from the environment's own bin folder; True when it passed."""
    tool = Path(sys.executable).parent / command[0]
    begun = time.monotonic()
    done = subprocess.run([str(tool), *command[1:]], cwd=ROOT, check=False)
    passed = done.returncode == 0
    print(f"{name}: {'passed' if passed else 'FAILED'} ({time.monotonic() - begun:.0f} s)", flush=True)
    return passed


def main(arguments: list[str]) -> int:
    """Run all gates, the tests last, so that their summary is the last thing to read."""
    install_node_client()
    install_autobahn()
    install_system()
    passed = [run(name, command) for name, command in GATES.items()]
    command = [sys.executable, "-m", "pytest", "-q", "--durations=30", *arguments]
    tests = subprocess.run(command, cwd=ROOT, check=False)
    return tests.returncode or (0 if all(passed) else 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
