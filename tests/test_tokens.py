"""leanserve.tokens: counted by the kernel, for any number of processes."""

from __future__ import annotations

import os
import random
import selectors
from collections.abc import Iterator

import pytest

from leanserve import tokens as module
from leanserve.errors import SettingsError
from leanserve.settings import MAX_TOKENS
from leanserve.tokens import Tokens


@pytest.fixture
def three() -> Iterator[Tokens]:
    tokens = Tokens.create(3)
    yield tokens
    tokens.close()


def test_as_many_as_there_are(three: Tokens) -> None:
    assert [three.take() for _ in range(5)] == [True, True, True, False, False]
    three.give()
    assert [three.take(), three.take()] == [True, False]
    three.give(2)
    assert three.taken() == 1
    assert repr(three) == "<Tokens 1 of 3 taken>"
    three.give(0)
    assert three.taken() == 1


def test_none_at_all() -> None:
    tokens = Tokens.create(0)
    assert not tokens.take()
    assert tokens.taken() == 0
    tokens.close()


def test_readable_while_one_is_free(three: Tokens) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(three.fds[0], selectors.EVENT_READ)
        assert selector.select(0)
        for _ in range(3):
            three.take()
        assert not selector.select(0)
        three.give()
        assert selector.select(0)


def test_the_most_that_can_be_counted_wherever_the_bytes_lie() -> None:
    """A pipe has room in whole pages: its first and its last may be used in part."""
    tokens = Tokens.create(MAX_TOKENS)
    taken = 0
    chance = random.Random(4)
    for _ in range(60):
        for _ in range(chance.randrange(5000)):
            taken += tokens.take()
        back = chance.randrange(taken + 1)
        for _ in range(back):
            tokens.give()
        taken -= back
        assert tokens.taken() == taken
    tokens.give(taken)
    assert tokens.taken() == 0
    tokens.close()


def test_more_than_the_pipe_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gives a user with many pipes only small ones."""
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(module, "_room", lambda _fd: 4096)
    Tokens.create(4096).close()
    with pytest.raises(SettingsError, match="cannot count to 4097"):
        Tokens.create(4097)
    assert os.listdir("/proc/self/fd") == before


def test_every_token_is_one_processs(three: Tokens) -> None:
    """Eight processes take and give back as fast as they can; at the end all are there, and none is more."""
    pids = []
    for number in range(8):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                mine = 0
                chance = random.Random(number)
                for _ in range(3000):
                    if mine and chance.random() < 0.5:
                        three.give()
                        mine -= 1
                    else:
                        mine += three.take()
                code = 0 if 0 <= mine <= 3 else 2
                three.give(mine)
            finally:
                os._exit(code)
        pids.append(pid)
    for _ in range(2000):
        assert 0 <= three.taken() <= 3
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 8
    assert [three.take() for _ in range(4)] == [True, True, True, False]
