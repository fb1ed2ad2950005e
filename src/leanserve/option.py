"""What one setting is: the facts beside a field, the check of a value, and reading it from text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, FrozenInstanceError, dataclass, field
from typing import Any, dataclass_transform

from leanserve.errors import SettingsError

__all__ = ["Frozen", "Option", "accepts_none", "check_value", "kind_of", "option", "parse_value"]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
class Frozen:
    """Base of frozen records made with keyword arguments: fields as in dataclasses, methods shared by all.

    A frozen dataclass compiles its methods from text, for each class and in each process that is started; for
    the groups of settings that took as long as all of click.
    """

    def __init_subclass__(cls) -> None:
        """Read the annotations; :func:`dataclasses.fields` and :func:`dataclasses.replace` work."""
        dataclass(init=False, repr=False, eq=False)(cls)

    def __init__(self, **values: Any) -> None:
        for item in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            if item.name in values:
                value = values.pop(item.name)
            elif item.default_factory is not MISSING:
                value = item.default_factory()
            elif item.default is not MISSING:
                value = item.default
            else:
                raise TypeError(f"{type(self).__name__} needs {item.name}")
            object.__setattr__(self, item.name, value)
        if values:
            raise TypeError(f"{type(self).__name__} has no {', '.join(values)}")

    def __setattr__(self, name: str, value: object) -> None:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({values})"

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if type(self) is type(other) else NotImplemented

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))


class Option(Frozen):
    """What the command line and the reference page have to know about one field.

    Attributes:
        help: one sentence, without the default and the unit.
        unit: "seconds", "bytes", "octal", ... or "".
        aliases: further spellings, those of uvicorn first (``timeout_keep_alive``).
        choices: the words allowed, or () for any text.
        synonyms: other spellings of the choices; a check turns them into the choice.
        minimum: smallest number allowed, or None.
        maximum: largest number allowed, or None.
        environment: further environment variables, asked after ``LEANSERVE_<NAME>``.
        separators: what stands between the values of a repeated option in an environment variable.
        secret: whether the value is never printed.
        table: not "": a file may have a table of lists, ``NAME = ["A", "B"]``, whose values this joins.
    """

    help: str
    unit: str = ""
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    synonyms: Mapping[str, str] = field(default_factory=dict)
    minimum: float | None = None
    maximum: float | None = None
    environment: tuple[str, ...] = ()
    separators: str = ",\n"
    secret: bool = False
    table: str = ""


def option(default: Any, help: str, **facts: Any) -> Any:
    """A dataclass field that is a setting; `facts` are those of :class:`Option`."""
    return field(default=default, metadata={"option": Option(help=help, **facts)})


# What `from __future__ import annotations` leaves of a field's type, and the values that it takes.
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "str": (str,),
    "bool": (bool,),
    "float": (int, float),
    "tuple": (tuple,),
    "None": (type(None),),
}
_SIZE = re.compile(r"([0-9]+) ?([kmg]?)(?:i?b)?", re.IGNORECASE)
_SIZE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def _words(item: dataclasses.Field[Any]) -> list[str]:
    return [word.strip().split("[")[0] for word in str(item.type).split("|")]


def accepts_none(item: dataclasses.Field[Any]) -> bool:
    """Whether the setting may be None."""
    return "None" in _words(item)


def kind_of(item: dataclasses.Field[Any]) -> str:
    """The kind that text is read as: "bool", "int", "float", "tuple" or "str"."""
    words = _words(item)
    return next((kind for kind in ("bool", "int", "float", "tuple") if kind in words), "str")


def check_value(item: dataclasses.Field[Any], value: Any) -> Any:
    """Return `value` as the setting keeps it: a list becomes a tuple, a synonym the word that it stands for.

    Raises:
        SettingsError: wrong type, not one of the choices, too small or too large.
    """
    facts: Option = item.metadata["option"]
    if isinstance(value, list):
        value = tuple(value)
    value = facts.synonyms.get(str(value), value) if facts.synonyms else value
    words = _words(item)
    allowed = tuple(kind for word in words for kind in _TYPES.get(word, ()))
    anything = any(word not in _TYPES for word in words)
    # bool is a subclass of int, but workers=True is a mistake
    wrong = not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)
    if wrong and not anything:
        shown = "what was given" if facts.secret else repr(value)
        raise SettingsError(f"{item.name} must be {item.type}, not {shown}")
    if isinstance(value, tuple) and not all(isinstance(part, str) for part in value):
        raise SettingsError(f"{item.name} must hold text only, not {value!r}")
    if isinstance(value, str) and facts.choices and value not in facts.choices:
        numbers = "a number or " if "int" in words else ""
        raise SettingsError(f"{item.name} must be {numbers}one of {', '.join(facts.choices)}, not {value!r}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        _check_range(item.name, facts, value)
    return value


def _check_range(name: str, facts: Option, value: float) -> None:
    if math.isnan(value):
        raise SettingsError(f"{name} must be a number, not nan")
    if facts.minimum is not None and value < facts.minimum:
        raise SettingsError(f"{name} must be at least {facts.minimum:g}, not {value!r}")
    if facts.maximum is not None and value > facts.maximum:
        raise SettingsError(f"{name} must be at most {facts.maximum:g}, not {value!r}")


def parse_value(item: dataclasses.Field[Any], text: str) -> Any:
    """Read one value from the command line or the environment; a size may be written ``64k`` or ``16m``.

    Raises:
        SettingsError: the text cannot be read, or :func:`check_value` refuses the value.
    """
    facts: Option = item.metadata["option"]
    kind = kind_of(item)
    if accepts_none(item) and text.lower() == "none":
        return None
    if kind in ("int", "float") and text not in facts.choices:
        return check_value(item, _parse_number(item, facts, text.strip()))
    return check_value(item, (text,) if kind == "tuple" else text)


def _parse_number(item: dataclasses.Field[Any], facts: Option, text: str) -> float:
    size = _SIZE.fullmatch(text) if facts.unit == "bytes" else None
    if size is not None:
        return int(size[1]) * _SIZE_UNITS[size[2].lower()]
    try:
        if facts.unit == "octal":
            return int(text, 8)
        return int(text) if kind_of(item) == "int" else float(text)
    except ValueError:
        other = f" or {' or '.join(facts.choices)}" if facts.choices else ""
        unit = f" of {facts.unit}" if facts.unit in ("seconds", "bytes") else ""
        raise SettingsError(f"{item.name} must be a number{unit}{other}, not {text!r}") from None
