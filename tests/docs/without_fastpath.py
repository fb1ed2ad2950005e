"""A pytest plugin, ``-p docs.without_fastpath``: leanserve without protocol/fastpath.py and fastframes.py.

Servers that tests start as processes of their own have the modules, and do not use them. Left out are the
tests of the modules themselves, and those marked `fastpath`: they say what a recogniser does, not what goes
over the wire.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest

_TESTS = Path(__file__).parents[1]
_LEFT_OUT = [
    *(_TESTS / "protocol" / name for name in ("test_fastpath.py", "test_fastframes.py")),
    _TESTS / "test_fuzz.py",
]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """The tests of the modules themselves."""
    return True if collection_path in _LEFT_OUT else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that are marked."""
    items[:] = [item for item in items if item.get_closest_marker("fastpath") is None]


class Recogniser:
    """Declines everything."""

    recognised = declined = 0

    def __init__(self, settings: object) -> None:
        pass

    def recognise_request(self, head: bytes) -> None:
        """Nothing is plain."""


class ResponseEncoder:
    """Encodes nothing."""

    def __init__(self, names: object) -> None:
        pass

    def check(self, headers: object) -> None:
        """Nothing is plain."""


class FrameRecogniser:
    """Declines everything."""

    recognised = declined = 0

    def recognise_frame(self, data: bytes, at: int, max_size_bytes: int) -> None:
        """Nothing is plain."""


def _put_in_place_of(name: str, *kinds: type) -> None:
    stand_in = types.ModuleType(name)
    for kind in kinds:
        setattr(stand_in, kind.__name__, kind)
    sys.modules[name] = stand_in


os.environ["LEANSERVE_FASTPATH"] = "0"
_put_in_place_of("leanserve.protocol.fastpath", Recogniser, ResponseEncoder)
_put_in_place_of("leanserve.protocol.fastframes", FrameRecogniser)
