"""Whether a process can be forked and its child go on: what an import may have left that does not survive."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

__all__ = ["find_cuda", "find_native_threads", "find_obstacle", "find_pools"]

# A pool that ends before a fork waits for its threads; the kernel takes a moment to forget them.
_GONE_WITHIN_S: Final = 0.5
_LOOK_EVERY_S: Final = 0.01

#: Libraries that keep pools of threads, by the names of their files.
_POOLS: Final = re.compile(
    r"/((?:lib(?:gomp|iomp5|omp|openblas|scipy_openblas|mkl_rt|tbb|arrow|grpc|jemalloc)|cygrpc)[^/\s]*)"
)
_CUDA_LIBRARY: Final = re.compile(r"/libcuda\.so\b")


def find_obstacle() -> str | None:
    """Why a fork of this process would make a child that hangs or fails; None when it would not.

    The child has the one thread that forked; locks that others held stay locked in it for ever. Nobody can
    tell from outside whether that hurts, so no thread may be left. Pools that end by themselves before a fork
    and start anew when they are needed (OpenBLAS does that) are none: that is found by forking once.
    """
    cuda = find_cuda(sys.modules, Path("/proc/self"))
    if cuda is not None:
        return cuda
    ours = threading.main_thread()
    threads = sorted(thread.name for thread in threading.enumerate() if thread is not ours)
    if threads:
        return f"{_counted(len(threads), 'thread')} ({', '.join(threads)})"
    _fork_once()
    natives = find_native_threads()
    if natives:
        pools = find_pools(Path("/proc/self/maps").read_text("utf-8", "replace"))
        hint = f"; libraries here that have pools: {', '.join(pools)}" if pools else ""
        return f"{_counted(len(natives), 'native thread')} ({', '.join(sorted(natives))}{hint})"
    return None


def find_cuda(modules: Mapping[str, Any], process: Path) -> str | None:
    """How CUDA is initialised: a forked process cannot use it, nor initialise it again.

    Args:
        modules: those that are imported.
        process: its directory in /proc.
    """
    cuda = getattr(modules.get("torch"), "cuda", None)
    if cuda is not None and cuda.is_initialized():
        return "CUDA is initialised (torch.cuda)"
    if _CUDA_LIBRARY.search((process / "maps").read_text("utf-8", "replace")):
        for entry in (process / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                if os.readlink(entry).startswith("/dev/nvidia"):
                    return f"CUDA is initialised (libcuda has {os.readlink(entry)} open)"
    return None


def find_native_threads() -> list[str]:
    """The kernel's names of the threads besides the main one; those that are ending get time to do so."""
    end = time.monotonic() + _GONE_WITHIN_S
    while True:
        names = []
        for entry in Path("/proc/self/task").iterdir():
            if entry.name != str(os.getpid()):
                with contextlib.suppress(OSError):  # it has ended
                    names.append((entry / "comm").read_text().strip())
        if not names or time.monotonic() > end:
            return names
        time.sleep(_LOOK_EVERY_S)


def find_pools(maps: str) -> list[str]:
    """The files among a process's mappings that are known to keep pools of threads."""
    return sorted(set(_POOLS.findall(maps)))


def _fork_once() -> None:
    """Have the handlers run that libraries have for a fork (pthread_atfork)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads: that is what we want to know
        pid = os.fork()
    if not pid:
        os._exit(0)
    with contextlib.suppress(ChildProcessError):  # the application ignores SIGCHLD: the kernel has reaped it
        os.waitpid(pid, 0)


def _counted(number: int, word: str) -> str:
    return f"1 {word} runs" if number == 1 else f"{number} {word}s run"
