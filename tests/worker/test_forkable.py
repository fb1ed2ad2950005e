"""leanserve.worker.forkable: what an import leaves that a forked process could not use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from leanserve.worker.forkable import find_cuda, find_pools

TWO_THREADS = """
import threading
event = threading.Event()
for name in "ab":
    threading.Thread(target=event.wait, name=name, daemon=True).start()
"""


def in_a_process(code: str) -> str:
    """What find_obstacle says there, behind this code."""
    end = "\nfrom leanserve.worker.forkable import find_obstacle\nprint(find_obstacle())"
    command = [sys.executable, "-W", "error", "-c", code + end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("", "None"),
        ("import asyncio, ssl, uvloop, anyio", "None"),
        ("from threading import *; Thread(target=print).start()", "None"),  # it has ended
        (TWO_THREADS, "2 threads run (a, b)"),
        ("from concurrent.futures import *; p = ThreadPoolExecutor(); p.submit(int)", "1 thread runs ("),
        ("import _thread, time; _thread.start_new_thread(time.sleep, (60,))", "1 native thread runs (python"),
        ("import numpy; a = numpy.ones((300, 300)); a @ a", "None"),  # OpenBLAS ends its pool before a fork
    ],
)  # fmt: skip
def test_threads(code: str, found: str) -> None:
    assert in_a_process(code).startswith(found)


def process(folder: Path, maps: str, *links: str) -> Path:
    """What /proc has of a process with these mappings and open files."""
    (folder / "fd").mkdir(exist_ok=True)
    (folder / "maps").write_text(maps)
    for number, link in enumerate(links):
        (folder / "fd" / str(number)).symlink_to(link)
    return folder


LIBCUDA = "7f00-7f01 r-xp 00000000 08:01 42 /usr/lib/x86_64-linux-gnu/libcuda.so.535.129.03\n"


@pytest.mark.parametrize(
    ("maps", "links", "found"),
    [
        ("", (), None),
        (LIBCUDA, ("/dev/null", "pipe:[1]"), None),  # loaded and not initialised
        ("7f00-7f01 r-xp /usr/lib/libc.so.6\n", ("/dev/nvidiactl",), None),  # NVML only reads
        (LIBCUDA, ("/dev/null", "/dev/nvidia0"), "CUDA is initialised (libcuda has /dev/nvidia0 open)"),
        (LIBCUDA.replace("libcuda.so.535.129.03", "libcudart.so.12"), ("/dev/nvidia0",), None),
    ],
)
def test_cuda_by_what_is_open(tmp_path: Path, maps: str, links: tuple[str, ...], found: str | None) -> None:
    assert find_cuda({}, process(tmp_path, maps, *links)) == found


@pytest.mark.parametrize(("answer", "found"), [(True, "CUDA is initialised (torch.cuda)"), (False, None)])
def test_cuda_by_what_torch_says(tmp_path: Path, answer: bool, found: str | None) -> None:
    torch = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: answer))
    assert find_cuda({"torch": torch}, process(tmp_path, "")) == found
    assert find_cuda({"torch": SimpleNamespace()}, process(tmp_path, "")) is None


def test_libraries_with_pools() -> None:
    maps = (
        "7f-7f r-xp /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0\n"
        "7f-7f rw-p /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0\n"
        "7f-7f r-xp /v/numpy.libs/libscipy_openblas64_-ff651d7f.so\n"
        "7f-7f r-xp /v/grpc/_cython/cygrpc.cpython-311-x86_64-linux-gnu.so\n"
        "7f-7f r-xp /usr/lib/libc.so.6\n"
    )
    assert find_pools(maps) == [
        "cygrpc.cpython-311-x86_64-linux-gnu.so", "libgomp.so.1.0.0", "libscipy_openblas64_-ff651d7f.so",
    ]
