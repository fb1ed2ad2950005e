"""Reading the documents: their fenced blocks, tables and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

_BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`]+)`")


def pages() -> list[Path]:
    """Every document: docs/, the README and the change log."""
    return [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CHANGELOG.md"]


def read(name: str) -> str:
    """The text of a document under docs/."""
    return (DOCS / name).read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: what stands behind the backticks, its lines, and where it begins."""

    kind: str
    text: str
    line: int


def blocks(text: str) -> Iterator[Block]:
    """All fenced blocks of a document."""
    for found in _BLOCK.finditer(text):
        yield Block(found[1].strip(), found[2], text.count("\n", 0, found.start()) + 1)


def table(text: str, *header: str) -> list[list[str]]:
    """The rows of all tables that have these column names; backticks are left in."""
    rows: list[list[str]] = []
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")] if line[:1] == "|" else []
        if tuple(cells) == header:
            inside = True
        elif not cells:
            inside = False
        elif inside and set(line) - set("|-"):
            assert len(cells) == len(header), line
            rows.append(cells)
    assert rows, f"no table with the columns {header}"
    return rows


def code(cell: str) -> str:
    """What stands in backticks, and nothing else does."""
    found = _CODE.fullmatch(cell)
    assert found, cell
    return found[1]


def codes(text: str) -> list[str]:
    """Everything in backticks outside of fenced blocks."""
    return _CODE.findall(_BLOCK.sub("", text))
