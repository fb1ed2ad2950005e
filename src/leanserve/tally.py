"""What a worker counts of its requests: statuses, early ends, and three distributions of times.

Counting is a word in a list in the worker's own memory. Once a second the scoreboard is told what has
come since, so the words there may be read by anybody at any time.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from math import inf
from typing import NamedTuple

__all__ = ["CAUSES", "LIMITS_S", "STATUSES", "Histogram", "Tally", "Totals"]

#: By the first digit; "none" is a client that left before one was sent.
STATUSES = ("none", "1xx", "2xx", "3xx", "4xx", "5xx", "other")
#: Why an exchange ended early. There are eight words, so that names can be added.
CAUSES = ("client_gone", "bad_request", "app_error", "shutdown", "deadline", "slow_reader", "other")
_CAUSE_WORDS = 8
_OTHER_CAUSE = CAUSES.index("other")
_CAUSE_PLACES = {name: place for place, name in enumerate(CAUSES)}

#: The limits of buckets: powers of two from a quarter of a millisecond to 512 s.
LIMITS_S = tuple(2.0**power for power in range(-12, 10))
_BUCKETS = len(LIMITS_S) + 1  # the last is for all that is longer


class Histogram(NamedTuple):
    """A distribution of times.

    Attributes:
        buckets: how many were shorter than each of LIMITS_S and not shorter than the one before; at the end
            all that were longer.
        sum_ns: their sum.
    """

    buckets: tuple[int, ...]
    sum_ns: int

    @property
    def total(self) -> int:
        """How many there were."""
        return sum(self.buckets)

    def quantile(self, share: float) -> float | None:
        """The time in seconds that `share` of all do not exceed, to the limit of its bucket; None of nothing.

        Of the last bucket, which has no limit, it is infinity.
        """
        wanted = share * self.total
        if not wanted:
            return None
        for limit, number in zip((*LIMITS_S, float("inf")), self.buckets, strict=True):
            wanted -= number
            if wanted <= 0:
                return limit
        raise AssertionError("the buckets hold less than their sum")

    def plus(self, other: Histogram) -> Histogram:
        """Both together."""
        pairs = zip(self.buckets, other.buckets, strict=True)
        return Histogram(tuple(one + two for one, two in pairs), self.sum_ns + other.sum_ns)


class _Times:
    """A distribution that grows."""

    __slots__ = ("buckets", "sum_s")

    def __init__(self) -> None:
        self.buckets = [0] * _BUCKETS
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        self.buckets[bisect_right(LIMITS_S, seconds)] += 1
        self.sum_s += seconds

    def add_many(self, times: list[float]) -> None:
        """Sorts them: cheaper than to look at each."""
        times.sort()
        before = 0
        for place, limit in enumerate((*LIMITS_S, inf)):
            upto = bisect_left(times, limit, before)
            self.buckets[place] += upto - before
            before = upto
        self.sum_s += sum(times)

    def words(self) -> Iterator[int]:
        yield from self.buckets
        yield int(self.sum_s * 1e9)


class Tally:
    """Counts of requests.

    Attributes:
        plain: by the first digit of their status the durations of responses that went out in one write, as
            most do: first byte and end are the same. A list is all that there is time for.
        limited: requests that a limit of ours has refused.
        refused: what was refused because it broke the protocol.
    """

    __slots__ = (
        "_causes", "_durations", "_first_bytes", "_gaps", "_statuses", "limited", "plain", "refused",
    )  # fmt: skip

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._statuses = [0] * 10
        self._causes = [0] * _CAUSE_WORDS
        self.plain: list[list[float]] = [[] for _ in range(10)]
        self._durations, self._first_bytes, self._gaps = _Times(), _Times(), _Times()
        self.limited = self.refused = 0

    def add(self, status: int, duration_s: float, first_byte_s: float | None, cause: str) -> None:
        """Any response; status 0 is none."""
        self._statuses[status // 100] += 1
        self._durations.add(duration_s)
        if first_byte_s is not None:
            self._first_bytes.add(first_byte_s)
        if cause:
            self._causes[_CAUSE_PLACES.get(cause, _OTHER_CAUSE)] += 1

    def add_websocket(self, status: int, cause: str) -> None:
        """A WebSocket has ended, or was refused: how long one stays open is no latency."""
        self._statuses[status // 100] += 1
        if cause:
            self._causes[_CAUSE_PLACES.get(cause, _OTHER_CAUSE)] += 1

    def add_gap(self, seconds: float) -> None:
        """From one piece of a streamed body to the next."""
        self._gaps.add(seconds)

    def take(self) -> list[tuple[int, int]]:
        """What was counted since the last call, as pairs of a word's place and its growth."""
        for place, times in enumerate(self.plain):
            self._statuses[place] += len(times)
            self._durations.add_many(times)
            self._first_bytes.add_many(times)
        words = [*self._statuses[:6], sum(self._statuses[6:]), *self._causes, self.limited, self.refused]
        for distribution in (self._durations, self._first_bytes, self._gaps):
            words += distribution.words()
        self._clear()
        return [(place, number) for place, number in enumerate(words) if number]


class Totals(NamedTuple):
    """What :class:`Tally` has told since the beginning, read back.

    Attributes:
        statuses: in the order of STATUSES.
        causes: in the order of CAUSES.
        limited, refused: as in Tally.
        duration: from the complete request head to the end of the response.
        first_byte: from the complete request head to the first byte of the response.
        gap: between two pieces of a streamed body.
    """

    statuses: tuple[int, ...]
    causes: tuple[int, ...]
    limited: int
    refused: int
    duration: Histogram
    first_byte: Histogram
    gap: Histogram

    @classmethod
    def of(cls, words: Sequence[int]) -> Totals:
        """Read the words that :meth:`Tally.take` names by their places."""
        rest = iter(words)

        def some(count: int) -> tuple[int, ...]:
            return tuple(next(rest) for _ in range(count))

        statuses, causes = some(len(STATUSES)), some(_CAUSE_WORDS)[: len(CAUSES)]
        limited, refused = some(2)
        histograms = [Histogram(some(_BUCKETS), *some(1)) for _ in range(3)]
        return cls(statuses, causes, limited, refused, *histograms)

    def plus(self, other: Totals) -> Totals:
        """Both together."""
        return Totals(
            tuple(map(sum, zip(self.statuses, other.statuses, strict=True))),
            tuple(map(sum, zip(self.causes, other.causes, strict=True))),
            self.limited + other.limited, self.refused + other.refused,
            self.duration.plus(other.duration), self.first_byte.plus(other.first_byte),
            self.gap.plus(other.gap),
        )  # fmt: skip
