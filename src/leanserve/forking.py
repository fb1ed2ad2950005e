"""What a forked process does beside its work: find its main, and end without running what is its parent's."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

__all__ = ["Collector", "end_with", "flush_streams", "resolve"]


class Collector:
    """Imports make next to no garbage; to look for it took a tenth of their time. What they leave stays, and
    need not be looked at again, here or in any worker; but only a process of our own may say so."""

    #: Whether this process, or the one that it was forked from, began as the command ``leanserve``.
    ours = False

    @classmethod
    def begin_imports(cls) -> None:
        """The command begins."""
        cls.ours = True
        gc.disable()

    @classmethod
    def end_imports(cls) -> None:
        """What stays is here."""
        if cls.ours:
            gc.freeze()
            gc.enable()


def resolve(name: str) -> Callable[[Any], int]:
    """The function of a dotted name ``package.module:attribute``; the parent may not import it itself."""
    module, _, attribute = name.partition(":")
    found: Callable[[Any], int] = getattr(importlib.import_module(module), attribute)
    return found


def end_with(run: Callable[[], int]) -> NoReturn:
    """In a forked process: run, and end with the exit code that it returns, or with 1 when it raises.

    Of the functions registered with atexit those are called that `run` itself has registered.
    """
    code = 1
    try:
        atexit._clear()  # the parent's
        code = run()
        threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing ends its processes
        atexit._run_exitfuncs()
    finally:
        # Whatever happened: the parent's frames lie below, with cleaning up that is not this process's to do.
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        try:
            flush_streams()
        finally:
            os._exit(code)


def flush_streams() -> None:
    """Empty the buffers, so that nothing is written twice; a full disk is no reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            pass
