"""Build hook of the wheel: it puts the folders `flows` and `tasks` into the package `mergeloom`.

In the repository both are packages of their own. Installed under these everyday names they would shadow modules of the
user. So the wheel holds them as `mergeloom.flows` and `mergeloom.tasks`, and every import of them is rewritten. An
editable install uses the repository as it is. See docs/design/2026-11-30-packages.md.
"""

from __future__ import annotations

import ast
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HOME = "mergeloom"
MOVED = ("flows", "tasks")
"""Packages of the repository that the wheel holds inside HOME."""
PREFIX = f"{HOME}."

_FIRST = "|".join(MOVED)
_MODULE = re.compile(rf"({_FIRST})((?:\.[A-Za-z_]\w*)+)(?::[A-Za-z_][\w.]*)?")
"""A string that names a module, or an object in it as `module:object`."""
_START = re.compile(rf"(?:{_FIRST})\.\w*")
_COMMAND = re.compile(rf"-m\s+(?:{_FIRST})\b|(?<![\w./-])(?:{_FIRST})/[\w/]+\.py\b")
"""A command, or the path of a file, that is true in the repository only."""
_IMPORTERS = frozenset({"import_module", "__import__", "find_spec", "run_module", "files"})
"""Functions whose first argument is the name of a module."""


class RelocationError(Exception):
    """A source file names a moved package in a way that cannot be rewritten."""


class RelocatingHook(BuildHookInterface):  # type: ignore[type-arg,unused-ignore]
    """Adds the package `mergeloom`, with `flows` and `tasks` in it, to a wheel."""

    PLUGIN_NAME = "custom"
    staging: Path | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the relocated package into a temporary folder and include it. An editable install stays as it is."""
        if version == "editable":
            return
        self.staging = Path(tempfile.mkdtemp(prefix="mergeloom-wheel-"))
        relocate(Path(self.root), self.staging / HOME)
        build_data["force_include"][str(self.staging / HOME)] = HOME

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the temporary folder."""
        if self.staging is not None:
            shutil.rmtree(self.staging)


def relocate(root: Path, target: Path) -> None:
    """Write `mergeloom`, `flows` and `tasks` of the repository `root` as one package into the new folder `target`.

    Raises RelocationError, naming file and line, for what cannot be rewritten.
    """
    modules = frozenset(module for package in MOVED for module in _modules(root, package))
    for package in (HOME, *MOVED):
        folder = target if package == HOME else target / package
        for path in _files(root / package):
            copy = folder / path.relative_to(root / package)
            copy.parent.mkdir(parents=True, exist_ok=True)
            where = str(path.relative_to(root))
            copy.write_bytes(_copied(path.read_bytes(), where, path.suffix, modules))
    for path in _files(root / "mergecore"):
        if path.suffix == ".py" and rewritten(path.read_bytes(), str(path), modules) != path.read_bytes():
            raise RelocationError(f"{path.relative_to(root)} names one of the packages {', '.join(MOVED)}; it must not")


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
            yield path


def _modules(root: Path, package: str) -> Iterator[str]:
    """The names of a package's modules and subpackages."""
    for path in _files(root / package):
        if path.suffix == ".py":
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _copied(content: bytes, where: str, suffix: str, modules: frozenset[str]) -> bytes:
    if suffix == ".py":
        return rewritten(content, where, modules)
    if any(_MODULE.search(text) for text in content.decode("utf-8", "replace").split()):
        raise RelocationError(f"{where} names a module of {' or '.join(MOVED)}, and only Python files are rewritten")
    return content


def rewritten(source: bytes, where: str, modules: frozenset[str]) -> bytes:
    """The Python file `source` with every import of a moved package, and every string that names one, rewritten.

    where: the file, for errors. modules: names of the modules that are moved. Raises RelocationError.
    """
    tree = ast.parse(source, where)
    plan = _Plan(where, modules)
    plan.visit(tree)
    lines = source.splitlines(keepends=True)
    for (line, column), expected in sorted(plan.insertions.items(), reverse=True):
        text = lines[line - 1]
        offset = _offset(text, column, expected)
        if offset is None:
            raise RelocationError(
                f"{where}:{line}: '{expected}' is written in a way that is not rewritten; use one line"
            )
        lines[line - 1] = text[:offset] + PREFIX.encode() + text[offset:]
    result = b"".join(lines)
    if ast.dump(ast.parse(result, where)) != ast.dump(_Expected(plan).visit(tree)):
        raise RelocationError(f"{where}: rewriting changed more than the names of modules")
    return result


def _offset(line: bytes, column: int, expected: str) -> int | None:
    """Where `expected` begins: at the column, or after `from` or the opening quotes there."""
    name = re.escape(expected.encode())
    match = re.compile(rb"(?:from[ \t]+|[rRuU]?(?:\"\"\"|'''|\"|'))?(?=" + name + rb")").match(line, column)
    return None if match is None else match.end()


class _Plan(ast.NodeVisitor):
    """Where the prefix has to be inserted: (line, byte column of the node) → the name that stands there."""

    def __init__(self, where: str, modules: frozenset[str]) -> None:
        self.where, self.modules = where, modules
        self.insertions: dict[tuple[int, int], str] = {}
        self.nodes: set[int] = set()
        """The id of every node that changes."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """`from flows.x import y`."""
        if node.level == 0 and node.module and _is_moved(node.module):
            self._insert(node, node.module)

    def visit_Import(self, node: ast.Import) -> None:
        """`import flows.x as x`; without `as` it binds the name `flows`, which the wheel does not have."""
        for alias in node.names:
            if _is_moved(alias.name):
                if alias.asname is None:
                    raise self._error(node, f"write `from {alias.name} import …` for `import {alias.name}`")
                self._insert(alias, alias.name)

    def visit_Call(self, node: ast.Call) -> None:
        """`import_module("flows")`: a bare package name is one of ours here only."""
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        first = node.args[0] if node.args else None
        if name in _IMPORTERS and isinstance(first, ast.Constant) and first.value in MOVED:
            self._insert(first, str(first.value))
        self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """A module's name that is put together when the program runs."""
        first = node.values[0] if node.values else None
        if isinstance(first, ast.Constant) and _START.fullmatch(str(first.value)):
            raise self._error(node, "the name of a module is put together here; write it as one string")
        for value in node.values:
            if not isinstance(value, ast.Constant):
                self.visit(value)
            elif _COMMAND.search(str(value.value)):
                raise self._error(node, _COMMAND_REMEDY)

    def visit_Constant(self, node: ast.Constant) -> None:
        """A string that names a module, as for `python -m`, loggers and entry points."""
        if not isinstance(node.value, str) or (node.lineno, node.col_offset) in self.insertions:
            return
        if _MODULE.fullmatch(node.value):
            parts = node.value.partition(":")[0].split(".")
            if ".".join(parts[:2]) not in self.modules:
                raise self._error(node, f"'{node.value}' looks like the name of a module, and there is none; rename it")
            self._insert(node, node.value)
        elif _COMMAND.search(node.value):
            raise self._error(node, _COMMAND_REMEDY)

    def visit_Expr(self, node: ast.Expr) -> None:
        """Docstrings are for readers: they may name files of the repository."""
        if not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def _insert(self, node: ast.ImportFrom | ast.alias | ast.Constant, expected: str) -> None:
        self.insertions[node.lineno, node.col_offset] = expected
        self.nodes.add(id(node))

    def _error(self, node: ast.AST, remedy: str) -> RelocationError:
        return RelocationError(f"{self.where}:{getattr(node, 'lineno', 0)}: {remedy}")


_COMMAND_REMEDY = (
    "a command or path of the repository does not exist in the wheel; use `python -m mergeloom` or __file__"
)


class _Expected(ast.NodeTransformer):
    """What the tree of a rewritten file must be."""

    def __init__(self, plan: _Plan) -> None:
        self.nodes = plan.nodes

    def visit(self, node: ast.AST) -> Any:
        """The node with the prefix where one was planned."""
        if id(node) in self.nodes:
            for name in ("module", "name", "value"):
                if isinstance(getattr(node, name, None), str):
                    setattr(node, name, PREFIX + getattr(node, name))
                    return node
        return self.generic_visit(node)


def _is_moved(module: str) -> bool:
    return module.partition(".")[0] in MOVED
