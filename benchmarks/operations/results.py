"""What a part has found, as it is kept in operations.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Found:
    """One case of one part with one server in one round.

    Attributes:
        figures: name to number; times in seconds, sizes in bytes.
        reason: why there are none.
        series: name to points, for a plot.
    """

    part: str
    case: str
    server: str
    round: int = 1
    figures: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    series: dict[str, list[float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Without what is empty."""
        return {name: value for name, value in asdict(self).items() if value not in ({}, "")}


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is done.

    Attributes:
        seconds: of a case of chaos with leanserve, and of the soak.
        peer_seconds: of a case of chaos with another server.
        connections: of the spread.
        tail_seconds: of one row of the long tail, in each round.
        rounds: of the long tail.
        trials: of the long requests at once.
        sample_s: between two looks of the soak.
    """

    seconds: float = 60.0
    peer_seconds: float = 5.0
    connections: int = 10_000
    tail_seconds: float = 2.0
    rounds: int = 2
    trials: int = 10
    sample_s: float = 10.0


Tell = Callable[[Found], None]
