"""Who is next among those who wait: turns between keys, first come first served within one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["FairQueue"]

T = TypeVar("T", bound=Hashable)


class FairQueue(Generic[T]):
    """Lines of waiting items, one per key. With one key for all of them it is a plain queue.

    Each key that has somebody in line gets one turn, then the next key has its own: a key with a hundred in
    line is served as often as a key with one. A key is known only while somebody is in its line, so there
    are never more keys than items. Everything but :meth:`most_crowded` takes the same time at any length.
    """

    __slots__ = ("_length", "_lines")

    def __init__(self) -> None:
        # The first line is the next to have its turn. Ordered dictionaries: a dict has no quick first item.
        self._lines: OrderedDict[Hashable, OrderedDict[T, None]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, key: Hashable, item: T) -> None:
        """Put `item`, which is not in the queue, at the end of its line."""
        self._lines.setdefault(key, OrderedDict())[item] = None
        self._length += 1

    def take(self) -> T:
        """Take the next out; there must be one."""
        key, line = next(iter(self._lines.items()))
        item, _ = line.popitem(last=False)
        self._length -= 1
        if line:
            self._lines.move_to_end(key)
        else:
            del self._lines[key]
        return item

    def remove(self, key: Hashable, item: T) -> bool:
        """Take out one that does not wait any longer; False when it is not here."""
        line = self._lines.get(key)
        if line is None or item not in line:
            return False
        del line[item]
        self._length -= 1
        if not line:
            del self._lines[key]
        return True

    def most_crowded(self, key: Hashable) -> tuple[Hashable, T] | None:
        """The last in the longest line with its key, if that line is longer than that of `key` would be with
        one more: whom a full queue can do without."""
        if not self._lines:
            return None
        longest, line = max(self._lines.items(), key=lambda pair: len(pair[1]))
        own = len(self._lines.get(key, ()))
        return (longest, next(reversed(line))) if len(line) > own + 1 else None
