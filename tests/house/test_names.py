"""Names that say nothing are not used: a name says what the value is (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EMPTY = {"held", "found", "one", "given", "made"}
FOLDERS = ("mergecore", "tasks", "flows", "mergeloom", "tests", "benchmarks", "examples")


def bound(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every variable, parameter, field and attribute that the code binds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


@pytest.mark.parametrize("folder", FOLDERS)
def test_names_say_what_a_value_is(folder: str) -> None:
    offenders = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in bound(ast.parse(path.read_text()))
        if name in EMPTY
    ]
    assert not offenders, f"{len(offenders)} names say nothing:\n" + "\n".join(offenders[:40])


def test_a_name_that_says_nothing_is_seen() -> None:
    source = "def of(one, *given):\n    for found in one:\n        made = held = found\n    return [x for x in (held := given)]\n"
    assert {name for _, name in bound(ast.parse(source))} >= EMPTY
