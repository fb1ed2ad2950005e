"""Write docs/reference/machines.md from the tables of the state machines, and the diagram within
docs/explain/closing.md; --check says if one is stale."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import leanserve
from leanserve.machine import Machine

PAGE = Path(__file__).parent / "reference" / "machines.md"
CLOSING = Path(__file__).parent / "explain" / "closing.md"

INTRO = """\
# State machines

Made by `python docs/make_diagrams.py` from the tables in `src/leanserve`; do not edit.

An arrow is a pair of the table: state, input, new state. Where no arrow leaves, the input is a bug of
leanserve and raises `IllegalTransition`. What the states mean stands beside them in the code;
[design.md](../explain/design.md), section 3, has all of them in one table.
"""


def machines() -> list[type[Machine[Any, Any]]]:
    """Every state machine of the package, by module and name."""
    for module in pkgutil.walk_packages(leanserve.__path__, "leanserve."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found = [kind for kind in Machine.__subclasses__() if kind.__module__.startswith("leanserve.")]
    return sorted(found, key=lambda kind: (kind.__module__, kind.__name__))


def arrows(kind: type[Machine[Any, Any]]) -> Iterator[str]:
    """The lines of a mermaid state diagram; inputs with the same effect share an arrow."""
    inputs: dict[tuple[Any, Any], list[str]] = {}
    for (state, move), target in kind.TABLE.items():
        inputs.setdefault((state, target), []).append(move.name)
    yield f"[*] --> {kind.START.name}"
    for (state, target), names in inputs.items():
        yield f"{state.name} --> {target.name}: {' or '.join(names)}"
    left = {state for state, target in inputs if state is not target}
    for state in type(kind.START):
        if state not in left and any(target is state for _, target in inputs):
            yield f"{state.name} --> [*]"


def diagram(kind: type[Machine[Any, Any]]) -> str:
    """The table as a drawing."""
    lines = "\n".join(f"    {line}" for line in arrows(kind))
    return f"```mermaid\nstateDiagram-v2\n{lines}\n```\n"


def section(kind: type[Machine[Any, Any]]) -> str:
    """Heading, what the class says of itself, and the diagram."""
    path = kind.__module__.removeprefix("leanserve.").replace(".", "/")
    said = kind.__dict__.get("__doc__")
    about = f"{' '.join(said.split())}\n\n" if said else ""
    title = kind.__name__.lstrip("_")
    return f"## {title} (`{path}.py`)\n\n{about}{diagram(kind)}"


def render() -> str:
    """The whole page."""
    return "\n".join([INTRO, *map(section, machines())])


def render_closing(page: str) -> str:
    """The page about closing, with the diagram of its machine put in."""
    (phases,) = (kind for kind in machines() if kind.__name__ == "PhaseMachine")
    before, begin, rest = page.partition("<!-- PhaseMachine -->\n")
    _, end, behind = rest.partition("<!-- end -->")
    return f"{before}{begin}\n{diagram(phases)}\n{end}{behind}"


def main(arguments: list[str]) -> int:
    """Write or check the pages; an exit code."""
    pages = {PAGE: render(), CLOSING: render_closing(CLOSING.read_text(encoding="utf-8"))}
    stale = [path for path, page in pages.items() if path.read_text(encoding="utf-8") != page]
    if "--check" not in arguments:
        for path in stale:
            path.write_text(pages[path], encoding="utf-8")
        return 0
    for path in stale:
        sys.stderr.write(f"{path} is stale: run python docs/make_diagrams.py\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
