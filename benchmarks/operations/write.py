"""Where the figures of operations are kept: operations.json, plots, and the pages made from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.operations.drawings import drawings
from benchmarks.operations.report import read, section

FILE = "operations.json"


def kept(folder: Path) -> dict[str, Any]:
    """What an operations.json of before holds, by part; empty when there is none."""
    file = folder / FILE
    return json.loads(file.read_text()) if file.exists() else {}


def kept_section(folder: Path) -> list[str]:
    """The section of RESULTS.md; no line when nothing has been measured."""
    held = kept(folder)
    return section(held) if held else []


def write(folder: Path, held: dict[str, Any]) -> None:
    """Put these parts into operations.json, in the place of those of before, and make the pages anew.

    RESULTS.md where there are results of the other benchmarks, OPERATIONS.md with this section otherwise.
    """
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    every = kept(folder)
    for part, one in held.items():
        drawn = drawings(part, read(one))
        for name, drawing in drawn.items():
            (folder / "plots" / f"{name}.svg").write_text(drawing)
        every[part] = {**one, "plots": list(drawn)}
    (folder / FILE).write_text(json.dumps(every, indent=1) + "\n")
    if (folder / "results.json").exists():
        from benchmarks.__main__ import rewrite  # it needs this module

        rewrite(folder)
    else:
        (folder / "OPERATIONS.md").write_text("\n".join(section(every)) + "\n")
