"""The one form that all state machines have: an enum of states, an enum of inputs, one table."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any, ClassVar, Generic, TypeVar

from leanserve.errors import IllegalTransition

__all__ = ["Machine", "Row", "Table"]

S = TypeVar("S", bound=IntEnum)
I = TypeVar("I", bound=IntEnum)  # noqa: E741 - S and I are the letters of automata theory


class Table(dict[Any, Any]):
    """(state, input) to state; a pair that is missing is illegal.

    IntEnum because its hash is the integer's own: a look-up per request has to be cheap. Where it has to be
    cheaper still than a call of ``advance``, the owner of a state assigns what the table gives.
    """

    __slots__ = ("_machine",)

    def __init__(self, machine: str, pairs: Mapping[Any, Any]) -> None:
        super().__init__(pairs)
        self._machine = machine

    def __missing__(self, pair: tuple[IntEnum, IntEnum]) -> Any:
        state, move = pair
        raise IllegalTransition(f"{self._machine}: {move.name} in state {state.name}")


class Row(dict[Any, Any]):
    """What one input does: state to state, as its table says."""

    __slots__ = ("_move", "_table")

    def __init__(self, table: Table, move: IntEnum) -> None:
        super().__init__({state: target for (state, taken), target in table.items() if taken is move})
        self._table = table
        self._move = move

    def __missing__(self, state: IntEnum) -> Any:
        return self._table[state, self._move]  # which tells why not


class Machine(Generic[S, I]):
    """A state that only :meth:`advance` assigns. A subclass sets ``START`` and ``TABLE``."""

    __slots__ = ("state",)

    START: ClassVar[IntEnum]
    TABLE: ClassVar[Any]  # a mapping; made a Table

    state: S

    def __init_subclass__(cls) -> None:
        cls.TABLE = Table(cls.__name__, cls.TABLE)

    def __init__(self) -> None:
        self.state = self.START  # type: ignore[assignment]  # a ClassVar cannot name a type variable

    @classmethod
    def on(cls, move: IntEnum) -> Row:
        """The part of the table for one input: state to state."""
        return Row(cls.TABLE, move)

    def advance(self, move: I) -> S:
        """Take `move` and return the new state.

        Raises:
            IllegalTransition: the table has no such pair; the state is unchanged.
        """
        self.state = self.TABLE[self.state, move]
        return self.state

    def accepts(self, move: I) -> bool:
        """Whether the table has a move from the present state."""
        return (self.state, move) in self.TABLE

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.state.name}>"
