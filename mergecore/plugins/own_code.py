"""The code of a user that scores depend on: which modules, with what content, and the folder they are imported from.

The numbers of an evaluator or a model factory depend on its lines. Plug-ins of this repository raise their `version`
when a computation changes; nobody does that for a file beside a spec, so its content enters the key.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from mergecore.checkpoints.sources.digests import file_sha256
from mergecore.errors import PluginError

OURS = frozenset({"mergecore", "mergeloom", "flows", "tasks"})
"""Packages whose numbers have a `version`."""
_INSTALLED = frozenset({"site-packages", "dist-packages"})

_FOLDERS: list[str] = []
"""The folder of a spec that is on the path of this process; none or one."""
_SEEN: dict[str, str] = {}
"""Module → SHA-256 of its file when this process was first ready to import it."""


@dataclass(frozen=True)
class OwnCode:
    """The modules of a user that an evaluator consists of or calls. It is sent to workers, and is empty for ours.

    folder: of the spec; it is on the path. plugin: the evaluator's own module, '' where it is one of ours. factories:
    modules that its fields name. version: takes the place of the content in keys. files: module → SHA-256.
    """

    folder: Path | None = None
    plugin: str = ""
    factories: tuple[str, ...] = ()
    version: str | int | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What enters the keys, as plain JSON: {} where all code is of this repository."""
        if self.version is not None:
            return {"code": {"version": self.version}}
        return {"code": dict(self.files)} if self.files else {}

    def ready(self) -> None:
        """Have this process import the code that the keys speak of: the folder on the path, changed modules anew.

        Raises PluginError where a file is not what it was when the sweep was planned, or where the evaluator itself
        was imported before it changed.
        """
        put_on_path(self.folder)
        files = _digests((self.plugin, *self.factories), self.folder)
        if self.version is None and files != dict(self.files):
            names = sorted(name for name in {*files, *self.files} if files.get(name) != self.files.get(name))
            raise PluginError(
                f"the code of {_listed(names)} is not what it was when the sweep was planned; run the same command "
                "again (nothing was recorded as failed)"
            )
        lasting = _digests((self.plugin,), self.folder)
        changed = {name for name in files if name in sys.modules and _SEEN.get(name, files[name]) != files[name]}
        if stale := changed & set(lasting):
            raise PluginError(
                f"the code of {_listed(sorted(stale))} changed after this process had imported it; start the process "
                "(or the worker) again"
            )
        _renew({name: digest for name, digest in files.items() if name not in lasting})
        _SEEN.update(files)


def code_of(plugin: type[Any], factories: Iterable[str], folder: Path | None, version: str | int | None) -> OwnCode:
    """Return the code of a user behind a plug-in, and have this process ready to import it.

    plugin: the class of the evaluator. factories: modules that it calls. folder: of the spec.
    """
    put_on_path(folder)
    module = "" if _is_ours(plugin.__module__) else plugin.__module__
    called = tuple(sorted(name for name in set(factories) if not _is_ours(name)))
    code = OwnCode(folder, module, called, version, _digests((module, *called), folder))
    code.ready()
    return code


def put_on_path(folder: Path | None) -> None:
    """Put the folder of a spec at the end of this process's path, in the place of the one before.

    At the end: a file `random.py` beside a spec must not stand in for the library's module.
    """
    for former in _FOLDERS:
        if former in sys.path and Path(former) != folder:
            sys.path.remove(former)
    _FOLDERS.clear()
    if folder is not None:
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        _FOLDERS.append(str(folder))
    importlib.invalidate_caches()


def folder_on_path() -> Path | None:
    """Return the folder of a spec or recipe that is on this process's path."""
    return Path(_FOLDERS[0]) if _FOLDERS else None


def imported_by(path: Path, module: str) -> dict[str, str]:
    """Return module → SHA-256 of what a file imports from the folder of the spec, for files that others import.

    module: the name under which this process keeps the file. Where what it imports has changed, all is imported anew.
    """
    folder = folder_on_path()
    names = [name for name in _imports("", path) if not _is_ours(name)] if folder else []
    own = [name for name in names if (file := _file(name)) is not None and _lies_in(file, folder)]
    files = _digests(own, folder)
    _renew(files, module)
    return files


def _renew(files: Mapping[str, str], *importers: str) -> None:
    """Have modules, and those that import them, imported anew where one of them changed."""
    if any(name in sys.modules and _SEEN.get(name, digest) != digest for name, digest in files.items()):
        for name in (*files, *importers):
            sys.modules.pop(name, None)
    _SEEN.update(files)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in OURS


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _digests(roots: Iterable[str], folder: Path | None) -> dict[str, str]:
    """Return module → SHA-256: the roots, the packages they lie in, and what these import of their own.

    Own is what lies in the folder of the spec or in the root's package. Only lines that say `import` are seen.
    """
    files: dict[str, Path] = {}
    waiting = [(name, name.partition(".")[0]) for name in roots if name]
    while waiting:
        name, package = waiting.pop()
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            module = ".".join(parts[:length])
            path = _file(module)
            if module in files or path is None:
                continue
            if module.partition(".")[0] == package or _lies_in(path, folder):
                files[module] = path
                waiting += [(other, package) for other in _imports(module, path) if not _is_ours(other)]
    return {name: file_sha256(files[name]) for name in sorted(files)}


def _lies_in(path: Path, folder: Path | None) -> bool:
    """Return whether a file is the user's own. A virtual environment may lie in the folder too."""
    return folder is not None and path.is_relative_to(folder) and not _INSTALLED & set(path.parts)


def _file(module: str) -> Path | None:
    """Return the file of a module without importing anything; None for one that has none or is not there."""
    top, *parts = module.split(".")
    finders = (finder.find_spec(top, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    spec = next((spec for spec in finders if spec is not None), None)
    if spec is None:
        return None
    path = Path(spec.origin) if spec.has_location and spec.origin else None
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    for part in parts:
        path = next(filter(Path.is_file, _candidates(places, part)), None)
        places = [place / part for place in places if (place / part).is_dir()]
    return path


def _candidates(places: Iterable[Path], name: str) -> Iterator[Path]:
    for place in places:
        yield place / name / "__init__.py"
        yield from (place / f"{name}{suffix}" for suffix in (*EXTENSION_SUFFIXES, ".py"))


def _imports(module: str, path: Path) -> Iterator[str]:
    """Yield the names a file imports, wherever in it; of `from a import b` both a and a.b, which may be a module."""
    if path.suffix != ".py":
        return
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):  # whoever imports it says what is wrong
        return
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            if source:
                yield source
                yield from (f"{source}.{alias.name}" for alias in node.names)
