"""Fixtures for all tests; the classes behind them are in tests/harness.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from harness import Certificates, Serving

ServeFactory = Callable[..., Serving]


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """A certificate for localhost, 127.0.0.1 and ::1, and its authority."""
    return Certificates.make(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session", autouse=True)
def runtime_directory() -> Iterator[Path]:
    """Where the servers of this run put their control sockets; not where those of the machine are."""
    with TemporaryDirectory(prefix="ls-") as name, pytest.MonkeyPatch.context() as patch:  # a short path
        patch.setenv("XDG_RUNTIME_DIR", name)
        yield Path(name) / "leanserve"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[ServeFactory]:
    """`serve("module:app", "--workers", "4", uds=..., certificates=...)`: a server that answers.

    It is stopped with SIGTERM at the end of the test and has to end cleanly, unless the test stopped it.
    """
    numbers = itertools.count()
    with ExitStack() as stack:

        def start(app: str, *options: str, **facts: Any) -> Serving:
            log = tmp_path / f"server-{next(numbers)}.log"
            return stack.enter_context(Serving(app, log, options, **facts))

        yield start
