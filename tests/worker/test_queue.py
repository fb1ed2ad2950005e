"""leanserve.worker.queue: against a model that is nothing but lists."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanserve.worker.queue import FairQueue

Step = tuple[str, int]


class Model:
    """Lines in the order of their turns, each a list."""

    def __init__(self) -> None:
        self.lines: list[tuple[Hashable, list[int]]] = []

    def line(self, key: Hashable) -> list[int]:
        return next((line for known, line in self.lines if known == key), [])

    def add(self, key: Hashable, item: int) -> None:
        if not self.line(key):
            self.lines.append((key, []))
        self.line(key).append(item)

    def take(self) -> int:
        key, line = self.lines.pop(0)
        if line[1:]:
            self.lines.append((key, line[1:]))
        return line[0]

    def remove(self, key: Hashable, item: int) -> bool:
        there = item in self.line(key)
        if there:
            self.line(key).remove(item)
            self.lines = [(known, line) for known, line in self.lines if line]
        return there


steps = st.lists(st.tuples(st.sampled_from("aaatr"), st.integers(0, 30)), max_size=80)


@given(steps, st.integers(1, 4))
def test_as_the_model(steps: list[Step], keys: int) -> None:
    queue: FairQueue[int] = FairQueue()
    model = Model()
    for number, (what, value) in enumerate(steps):
        key = None if value % keys == 0 else value % keys  # None is a key like others
        if what == "a":
            queue.add(key, number)
            model.add(key, number)
        elif what == "t" and model.lines:
            assert queue.take() == model.take()
        elif what == "r":
            assert queue.remove(key, value) == model.remove(key, value)
        assert len(queue) == sum(len(line) for _, line in model.lines)
        assert bool(queue) == bool(model.lines)
        crowded = queue.most_crowded(key)
        longest = max((len(line) for _, line in model.lines), default=0)
        if longest >= len(model.line(key)) + 2:
            assert crowded is not None
            line = model.line(crowded[0])
            assert len(line) == longest
            assert line[-1] == crowded[1]
        else:
            assert crowded is None
    while queue:
        assert queue.take() == model.take()
    assert not model.lines


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60))
def test_one_key_is_a_plain_queue(items: list[int]) -> None:
    queue: FairQueue[tuple[int, int]] = FairQueue()
    for pair in enumerate(items):
        queue.add("same", pair)
    assert [queue.take() for _ in items] == list(enumerate(items))


def test_who_has_a_hundred_in_line_has_a_turn_as_the_others() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(100):
        queue.add("batch", f"batch {number}")
    for name in ("anna", "ben"):
        queue.add(name, name)
    assert [queue.take() for _ in range(5)] == ["batch 0", "anna", "ben", "batch 1", "batch 2"]
    queue.add("anna", "anna")
    assert [queue.take() for _ in range(3)] == ["batch 3", "anna", "batch 4"]


@pytest.mark.parametrize("count", [1, 500])
def test_nothing_is_kept_of_keys_that_have_left(count: int) -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(count):
        queue.add(number, number)
    for number in range(count):
        assert queue.remove(number, number) if number % 2 else queue.take() == number
    assert not queue
    assert not queue._lines
