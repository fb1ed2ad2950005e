"""A seeded differential fuzzer: `fast is None or fast == strict`, for whatever goes over the wire.

``python -m fuzz --help``, from the folder tests/. Every case has a random generator of its own, made from
seed, kind and number, so one case can be made again without those before it. The recognisers live as long as
the run: their tables are a part of what is tested.
"""

from __future__ import annotations

import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Generic, Self, TypeVar

__all__ = ["Difference", "Finding", "Kind", "fuzz", "less"]

Case = TypeVar("Case")

# How many smaller cases are tried before the smallest so far is good enough.
_SHRINKING_TRIES = 5000


class Difference(Exception):
    """The two ways differ: their results."""


class Kind(ABC, Generic[Case]):
    """One kind of input, and both ways to treat it.

    Attributes:
        subject: makes the recogniser or encoder.
        recognised, declined: decisions of the recogniser.
        refused: inputs that the strict way refuses, wholly or from some byte on.
    """

    name: ClassVar[str]
    number: ClassVar[int]
    subject: Callable[..., Any]

    def __init__(self) -> None:
        self.recognised = self.declined = self.refused = 0

    @abstractmethod
    def make(self, random: Random) -> Case:
        """A case."""

    @abstractmethod
    def compare(self, case: Case) -> None:
        """Treat it both ways, and count. Raises Difference."""

    @abstractmethod
    def anew(self) -> Self:
        """The same with empty tables."""

    @abstractmethod
    def smaller(self, case: Case) -> Iterator[Case]:
        """Cases with something left out, large parts first."""

    def differs(self, case: Case) -> tuple[Any, ...] | None:
        """What both ways give, when that is not the same."""
        try:
            self.compare(case)
        except Difference as found:
            return found.args
        except Exception:  # noqa: BLE001 - neither way may raise anything else: that is a find, too
            return (traceback.format_exc(),)
        return None


@dataclass(frozen=True, slots=True)
class Finding:
    """A case that the two ways treat differently.

    Attributes:
        number: of the case; with the seed it says all.
        case, results: as it was made.
        least, least_results: as small as it became; the same as above when it differs only behind the cases
            before it, which left something in a table.
    """

    kind: str
    seed: int
    number: int
    case: Any
    results: tuple[Any, ...]
    least: Any
    least_results: tuple[Any, ...]

    def __str__(self) -> str:
        whole = [f"{self.kind}: seed {self.seed}, case {self.number}", f"  case:  {self.case!r}"]
        whole += [f"  {result}" for result in self.results]
        if self.least is self.case:
            return "\n".join([*whole, "  (not smaller, or not without the cases before it)"])
        return "\n".join([*whole, f"  least: {self.least!r}", *(f"  {it}" for it in self.least_results)])


def fuzz(
    kind: Kind[Any], *, seed: int, count: int, first: int = 0, seconds: float | None = None
) -> tuple[int, Finding | None]:
    """Compare `count` cases, from number `first` on, or as many as go into `seconds`.

    Returns:
        How many it were, and what differs first.
    """
    random = Random()
    end = None if seconds is None else time.monotonic() + seconds
    for number in range(first, first + count):
        if end is not None and time.monotonic() > end:
            return number - first, None
        random.seed(seed << 48 | kind.number << 40 | number)
        case = kind.make(random)
        results = kind.differs(case)
        if results is not None:
            least, least_results = _shrink(kind, case, results)
            found = Finding(kind.name, seed, number, case, results, least, least_results)
            return number - first + 1, found
    return count, None


def _shrink(kind: Kind[Any], case: Any, results: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Leave out what can be left out while the difference stays."""
    tries, shrunk = 0, kind.anew().differs(case) is not None
    while shrunk:
        shrunk = False
        for smaller in kind.smaller(case):
            tries += 1
            found = kind.anew().differs(smaller)
            if found is not None:
                case, results, shrunk = smaller, found, True
                break
            if tries >= _SHRINKING_TRIES:
                break
    return case, results


def less(data: bytes) -> Iterator[bytes]:
    """`data` with one part left out: halves first, single bytes last."""
    size = (len(data) + 1) // 2
    while size:
        for at in range(0, len(data), size):
            yield data[:at] + data[at + size :]
        size //= 2
