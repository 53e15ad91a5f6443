"""Plug-ins of installed packages: what their entry points say, read once and without importing any of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

PREFIX = "mergeloom."
OURS = "mergeloom"


@dataclass(frozen=True)
class Entry:
    """One entry point: the plug-in's name, the package (distribution) that offers it, and the package's version."""

    name: str
    package: str
    version: str
    target: EntryPoint

    def load(self) -> Any:
        """Import the module and return what the entry point names. Raises whatever the import raises."""
        return self.target.load()


@cache
def installed_plugins() -> Mapping[str, Mapping[str, tuple[Entry, ...]]]:
    """Return group ('mergeloom.methods') → name → every package's entry of that name."""
    groups: dict[str, dict[str, tuple[Entry, ...]]] = {}
    targets = entry_points()
    for group in targets.groups:
        if group.startswith(PREFIX):
            names = groups.setdefault(group, {})
            for target in targets.select(group=group):
                package = target.dist
                entry = Entry(target.name, package.name if package else "", package.version if package else "", target)
                names[target.name] = (*names.get(target.name, ()), entry)
    return groups
