"""Write docs/reference/settings.md from src/leanserve/settings.py; with --check, say whether it is fresh."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from leanserve.option import Option, kind_of
from leanserve.settings import options

PAGE = Path(__file__).parent / "reference" / "settings.md"

INTRO = """\
# Settings

Made by `python docs/make_settings.py` from `src/leanserve/settings.py`; do not edit.

Four ways to give a setting, all with the same name:

- command line: `--keep-alive-timeout 30`; a switch is `--access-log` or `--no-access-log`;
- environment: `LEANSERVE_KEEP_ALIVE_TIMEOUT=30`; several values of an option that may be repeated are
  separated by commas (by line breaks for `LEANSERVE_HEADER`); the command line wins;
- a file: `keep_alive_timeout = 30` in `leanserve.toml`; the environment wins
  ([howto/config.md](../howto/config.md));
- in code: `Server(app, keep_alive_timeout=30)`; neither the environment nor a file is read.

Sizes may be written `64k`, `16m`, `1g`. `none` stands for no value where there is text. The spellings under
"also" are taken in all four ways. Variables under "also" are asked last.
"""


def _default(item: dataclasses.Field[Any], facts: Option) -> str:
    value = item.default
    if value is None or value == ():
        return "none"
    if facts.unit == "octal":
        return f"`{value:o}`"
    if isinstance(value, tuple):
        return ", ".join(f"`{part}`" for part in value)
    if isinstance(value, bool):
        return "on" if value else "off"
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return f"`{shown}`" if shown else "empty"


def _row(item: dataclasses.Field[Any], facts: Option) -> str:
    dashed = item.name.replace("_", "-")
    flag = f"--{dashed}" + (f" / --no-{dashed}" if kind_of(item) == "bool" else "")
    meaning = facts.help
    if facts.choices:
        meaning += " One of " + ", ".join(f"`{choice}`" for choice in facts.choices)
        meaning += " or a number." if kind_of(item) == "int" else "."
    also = [f"`--{alias.replace('_', '-')}`" for alias in facts.aliases]
    also += [f"`${name}`" for name in facts.environment]
    unit = facts.unit if facts.unit in ("seconds", "bytes") else ""
    return f"| `{flag}` | {_default(item, facts)} | {unit} | {meaning} | {', '.join(also)} |"


def _lines() -> Iterator[str]:
    yield INTRO
    for group, members in groupby(options(), key=lambda found: found[0]):
        yield f"## {group.__doc__}\n"
        yield "| option | default | unit | meaning | also |"
        yield "|---|---|---|---|---|"
        yield from (_row(item, facts) for _, item, facts in members)
        yield ""


def main(arguments: list[str]) -> int:
    """Write or check the page; an exit code."""
    check = "--check" in arguments
    paths = [argument for argument in arguments if argument != "--check"]
    page = Path(paths[0]) if paths else PAGE
    text = "\n".join(_lines())
    if not check:
        page.write_text(text, encoding="utf-8")
        return 0
    if page.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write(f"{page} is stale: run python docs/make_settings.py\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
