"""leanserve.worker.memory: given back behind a crowd, and not otherwise."""

from __future__ import annotations

import threading

from leanserve.worker.memory import Trimmer, trim


def trims(*looks: tuple[float, int]) -> list[float]:
    """At which of the looks (time, connections) memory is given back."""
    done = threading.Event()
    trimmer = Trimmer(done.set)
    found = []
    for now, connections in looks:
        trimmer.look(connections, now)
        for thread in threading.enumerate():
            if thread.name == "leanserve-trim":
                thread.join(10)
        if done.is_set():
            found.append(now)
            done.clear()
    return found


def test_behind_a_crowd() -> None:
    assert trims((1, 0), (2, 1000), (3, 900), (4, 400), (5, 300)) == [4]


def test_not_for_a_few_nor_while_most_are_here() -> None:
    assert trims((1, 99), (2, 0)) == []
    assert trims((1, 1000), (2, 600), (3, 1000), (4, 501)) == []


def test_not_again_at_once() -> None:
    assert trims((1, 1000), (2, 0), (3, 1000), (3.5, 0), (4, 0), (5, 0)) == [2, 4]


def test_the_real_one() -> None:
    trim()  # with any C library
