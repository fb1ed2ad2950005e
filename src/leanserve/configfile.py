"""The settings file: ``leanserve.toml``, or the table ``[tool.leanserve]`` of ``pyproject.toml``.

Names are those of the options, with dashes or underscores; values are of TOML's own types, and whatever may
be written on the command line may be written as a string ("64k", "none"). Nothing of TOML is imported when
there is no file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import Field
from typing import Any

from leanserve.errors import SettingsError
from leanserve.option import Frozen, Option, accepts_none, check_value, kind_of, parse_value
from leanserve.settings import options

__all__ = ["FILES", "ConfigFile", "find_config", "read_config"]

#: Looked for in the working directory, in this order; the first that says something is the only one read.
FILES = ("leanserve.toml", "pyproject.toml")

# Any way to write the table. Most projects have a pyproject.toml that is not about us: it is not parsed.
_OUR_TABLE = re.compile(
    rb"""^[ \t]*\[?[ \t]*["']?tool["']?[ \t]*(?:\.[ \t]*["']?leanserve|\]|=)""", re.MULTILINE
)


class ConfigFile(Frozen):
    """What a file says.

    Attributes:
        name: the path as it was given, or found.
        app: the application, ``module:attribute``, or None.
        values: checked values by the names of the settings.
    """

    name: str
    app: str | None
    values: Mapping[str, Any]


def find_config(named: str | None) -> ConfigFile | None:
    """The file that `named` stands for, else the one in the working directory.

    Args:
        named: a path, "none" for no file at all, or None (or "") to look for one.

    Raises:
        SettingsError: as :func:`read_config`.
    """
    if named:
        return None if named.lower() == "none" else read_config(named)
    for name in FILES:
        if os.path.exists(name) and (name == "leanserve.toml" or _OUR_TABLE.search(_read(name))):
            return read_config(name)
    return None


def read_config(path: str) -> ConfigFile:
    """Read and check a file; of one that is called pyproject.toml, the table ``[tool.leanserve]``.

    Raises:
        SettingsError: it cannot be read, is no TOML, or a name or value is not one of a setting. The message
            begins with the path, and with the name that is wrong.
    """
    import tomllib

    try:
        table: Any = tomllib.loads(_read(path).decode("utf-8"))
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not UTF-8 text, as TOML has to be") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not TOML: {' '.join(str(error).split())}") from None
    if os.path.basename(path) == "pyproject.toml":
        tool = table.get("tool")
        table = tool.get("leanserve") if isinstance(tool, dict) else None
        if not isinstance(table, dict):
            raise SettingsError(f"{path} has no table [tool.leanserve]: write one, or name another file")
    return _check(path, table)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise SettingsError(f"cannot read config {path}: {error.strerror}") from None


def _check(path: str, table: Mapping[str, Any]) -> ConfigFile:
    known = {name: item for _, item, facts in options() for name in (item.name, *facts.aliases)}
    app: str | None = None
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name == "app":
            if not isinstance(value, str) or not value:
                raise SettingsError(f'{path}: app: write app = "module:attribute", not {value!r}')
            app = value
            continue
        item = known.get(name)
        if item is None:
            raise SettingsError(f"{path}: {key!r} is no setting; {_hint(name, value, known)}")
        if item.name in values:
            raise SettingsError(f"{path}: {key}: {item.name} is given already, under another spelling")
        try:
            values[item.name] = _value(item, value)
        except SettingsError as error:
            raise SettingsError(f"{path}: {key}: {error}") from None
    return ConfigFile(name=path, app=app, values=values)


def _value(item: Field[Any], value: Any) -> Any:
    facts: Option = item.metadata["option"]
    if isinstance(value, str):
        if kind_of(item) == "bool" and not (accepts_none(item) and value.lower() == "none"):
            raise SettingsError("write true or false, without quotes")
        return parse_value(item, value)
    if facts.unit == "octal":
        # 0o660 and 432 are the same to TOML, and 660 is something else
        raise SettingsError(f'write the digits in quotes, as in {item.name} = "660"')
    if "Mapping" in str(item.type) and isinstance(value, dict):
        return value
    if facts.table and isinstance(value, dict):
        value = [f"{name}={_joined(facts.table, name, values)}" for name, values in value.items()]
    if "Callable" in str(item.type) or "Mapping" in str(item.type):
        raise SettingsError("write a string")
    return check_value(item, value)


def _joined(separator: str, name: str, values: Any) -> str:
    parts = values if isinstance(values, list) else [values]
    if not parts or not all(isinstance(part, str) and separator not in part for part in parts):
        raise SettingsError(f'{name}: write texts without "{separator}", as in {name} = ["0", "1"]')
    return separator.join(parts)


def _hint(name: str, value: Any, known: Mapping[str, Any]) -> str:
    if isinstance(value, dict):
        return "settings stand in the table itself and not in tables of their own"
    import difflib  # for this message only

    close = difflib.get_close_matches(name, [*known, "app"], n=1)
    return f"did you mean {close[0]}?" if close else "leanserve config names them all"
