"""A pytest plugin, ``-p docs.without_fastpath``: leanserve as if protocol/fastpath.py had been deleted."""

from __future__ import annotations

import sys
import types


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


_stand_in = types.ModuleType("leanserve.protocol.fastpath")
_stand_in.Recogniser = Recogniser  # type: ignore[attr-defined]
_stand_in.ResponseEncoder = ResponseEncoder  # type: ignore[attr-defined]
sys.modules[_stand_in.__name__] = _stand_in
