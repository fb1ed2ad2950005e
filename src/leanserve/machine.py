"""The one form that all state machines have: an enum of states, an enum of inputs, one table."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import ClassVar, Generic, TypeVar

from leanserve.errors import IllegalTransition

__all__ = ["Machine"]

S = TypeVar("S", bound=IntEnum)
I = TypeVar("I", bound=IntEnum)  # noqa: E741 - S and I are the letters of automata theory


class Machine(Generic[S, I]):
    """A state that only :meth:`advance` assigns.

    A subclass sets ``START`` and ``TABLE``; a pair that is missing from the table is illegal. IntEnum because
    its hash is the integer's own: a look-up per request has to be cheap.
    """

    __slots__ = ("state",)

    START: ClassVar[IntEnum]
    TABLE: ClassVar[Mapping[tuple[IntEnum, IntEnum], IntEnum]]

    state: S

    def __init__(self) -> None:
        self.state = self.START  # type: ignore[assignment]  # a ClassVar cannot name a type variable

    def advance(self, move: I) -> S:
        """Take `move` and return the new state.

        Raises:
            IllegalTransition: the table has no such pair; the state is unchanged.
        """
        try:
            state = self.TABLE[self.state, move]
        except KeyError:
            raise IllegalTransition(
                f"{type(self).__name__}: {move.name} in state {self.state.name}"
            ) from None
        self.state = state  # type: ignore[assignment]  # as above
        return self.state

    def accepts(self, move: I) -> bool:
        """Whether the table has a move from the present state."""
        return (self.state, move) in self.TABLE

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.state.name}>"
