"""``--env-file``: KEY=VALUE lines for the environment, by a small and strict grammar.

    # a comment; empty lines are skipped
    export MODEL=/models/a      the word export may stand in front
    NAME='as it stands'         nothing is replaced inside quotes, "..." likewise
    EMPTY=

No expansion, no continuation lines: what a line says is what the application gets.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from leanserve.errors import SettingsError

__all__ = ["load_env_file", "parse_env_lines", "without_env_files"]

_loaded: dict[str, str] = {}  # what has come into os.environ from files

_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)")


def parse_env_lines(text: str, *, name: str = "env_file") -> dict[str, str]:
    """The variables that `text` defines; the last definition of a name stands.

    Raises:
        SettingsError: a line is not KEY=VALUE, or a quote is not closed; the message begins with `name`:line.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise SettingsError(f"{name}:{number}: write KEY=VALUE, not {line!r}")
        found[match[1]] = _value(match[2], f"{name}:{number}")
    return found


def _value(text: str, place: str) -> str:
    quote = text[:1]
    if quote in ("'", '"'):
        inner, closing, rest = text[1:].partition(quote)
        if not closing or (rest.strip() and not rest.lstrip().startswith("#")):
            raise SettingsError(f"{place}: the value must end with its quote {quote}")
        return inner
    # as in a shell, a comment needs a blank before it: URL=http://x/#y keeps its fragment
    return re.split(r"\s+#", text, maxsplit=1)[0].rstrip()


def load_env_file(path: str, environment: MutableMapping[str, str] | None = None) -> None:
    """Put the variables of a file into the environment; a variable that is set already keeps its value.

    Raises:
        SettingsError: the file cannot be read, or a line is wrong.
    """
    target = os.environ if environment is None else environment
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsError(f"cannot read env_file {path}: {reason}") from None
    for key, value in parse_env_lines(text, name=path).items():
        if key not in target:
            target[key] = value
            if target is os.environ:
                _loaded[key] = value


def without_env_files() -> dict[str, str]:
    """The environment but for what files have put there: who starts this program anew reads them anew."""
    return {key: value for key, value in os.environ.items() if _loaded.get(key) != value}
