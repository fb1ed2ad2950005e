"""docs/reference/demands.md: every test that it names exists, and every row of the demands has one."""

from __future__ import annotations

import ast
from functools import cache

import pytest

from docs.documents import ROOT, code, read, table

ROWS = {*range(1, 49), 50, *range(52, 57), 59, 60}
TABLE = table(read("reference/demands.md"), "row", "what holds", "test")
PROOFS = [(int(row), code(test)) for row, _, test in TABLE]


@cache
def functions(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


@pytest.mark.parametrize("test", sorted({test for _, test in PROOFS}))
def test_is_there(test: str) -> None:
    path, _, name = test.partition("::")
    assert name in functions(path)


def test_every_row_has_one() -> None:
    assert {row for row, _ in PROOFS} == ROWS


def test_the_tests_for_demands_are_all_named() -> None:
    for path in ("tests/worker/test_demands.py", "tests/e2e/test_demands.py"):
        named = {test.partition("::")[2] for _, test in PROOFS if test.startswith(path)}
        assert named == {name for name in functions(path) if name.startswith("test_")}
