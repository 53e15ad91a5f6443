"""The plug-ins of one kind by name: those of this repository, and those of installed packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

from mergecore.errors import PluginError
from mergecore.plugins.installed import OURS, PREFIX, Entry, installed_plugins

Value = TypeVar("Value")


class Shelf(Mapping[str, Value], Generic[Value]):
    """A mapping from a name to a plug-in. What an installed package offers is imported when its name is asked for.

    own: the plug-ins of this repository, by name: the class itself, or 'module:class' where its imports are heavy.
    kind, group: 'method' and 'methods', say; packages offer it in the entry-point group 'mergeloom.methods'. accept:
    returns the plug-in of what an entry point names; raises TypeError, with the reason, where it is none of this kind.
    """

    def __init__(self, kind: str, group: str, own: Mapping[str, Value | str], accept: Callable[[Any], Value]) -> None:
        self.kind, self.group, self.own, self._accept = kind, PREFIX + group, dict(own), accept
        self._loaded: dict[str, Value] = {}

    def __getitem__(self, name: str) -> Value:
        """Return the plug-in. Raises PluginError where two packages offer the name, or its package does not work."""
        entries = self._entries(name)
        if name not in self.own and not entries:
            raise KeyError(name)
        self._refuse_clash(name)
        if not entries and not isinstance(own := self.own[name], str):
            return own
        if name not in self._loaded:
            self._loaded[name] = self._foreign(entries[0]) if entries else self._imported(str(self.own[name]))
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        """Yield every name: ours first, those of packages in alphabetical order. Imports nothing."""
        yield from self.own
        yield from sorted(name for name in self._installed() if name not in self.own)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self._installed()

    def package(self, name: str) -> str:
        """Return the package that offers the plug-in, with its version; '' for our own. Imports nothing."""
        return " and ".join(f"{entry.package} {entry.version}" for entry in self._entries(name))

    def trouble(self, name: str) -> str:
        """Return why the plug-in cannot be used; '' where it can."""
        try:
            self[name]
        except PluginError as error:
            return str(error)
        return ""

    def check_own(self, plugin: Any) -> None:
        """Raise PluginError where `plugin` is not what its name stands for here: results are kept under that name."""
        name, kind = plugin.name, type(plugin)
        if name in self and (registered := self[name]) is not kind:
            raise PluginError(
                f"{kind.__module__}.{kind.__qualname__} is called '{name}', and so is the {self.kind} "
                f"{_path(registered)}; results of one would be taken for those of the other. Give it a name of its own"
            )
        if name not in self:
            raise PluginError(
                f"the {self.kind} '{name}' ({kind.__module__}.{kind.__qualname__}) is not registered; name it in the "
                f"entry-point group '{self.group}' of its package and install the package again"
            )

    def _installed(self) -> Mapping[str, tuple[Entry, ...]]:
        return installed_plugins().get(self.group, {})

    def _entries(self, name: str) -> tuple[Entry, ...]:
        return self._installed().get(name, ())

    def _refuse_clash(self, name: str) -> None:
        packages = [OURS] if name in self.own else []
        packages += [f"{entry.package} ({entry.target.value})" for entry in self._entries(name)]
        if len(packages) > 1:
            raise PluginError(
                f"two packages offer a {self.kind} called '{name}': {' and '.join(packages)}; uninstall one of them, "
                "or have its author give the plug-in another name"
            )

    def _imported(self, path: str) -> Value:
        module, _, attribute = path.partition(":")
        loaded: Value = getattr(import_module(module), attribute)
        return loaded

    def _foreign(self, entry: Entry) -> Value:
        where = f"the {self.kind} '{entry.name}' of the package {entry.package} {entry.version} ({entry.target.value})"
        remedy = f"repair the package, bring it up to date, or remove it (`pip uninstall {entry.package}`)"
        try:
            value = entry.load()
        except Exception as error:
            raise PluginError(f"{where} cannot be imported: {type(error).__name__}: {error}; {remedy}") from error
        try:
            plugin = self._accept(value)
        except TypeError as error:
            raise PluginError(f"{where} {error}; {remedy}") from None
        name = getattr(plugin, "name", None)
        if name != entry.name:
            raise PluginError(f"{where} calls itself '{name}'; the entry point and `name` must be the same; {remedy}")
        return plugin


def _path(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else repr(value)


def class_of(*bases: type[Any]) -> Callable[[Any], Any]:
    """Return what a shelf of classes accepts: concrete subclasses of one of `bases` with a whole, positive version."""

    def accept(value: Any) -> Any:
        if not isinstance(value, type) or not issubclass(value, bases):
            raise TypeError(f"is no subclass of {' or '.join(map(_path, bases))}")
        if missing := sorted(getattr(value, "__abstractmethods__", ())):
            raise TypeError(f"does not define {', '.join(missing)}")
        version = getattr(value, "version", 1)
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise TypeError(f"has the version {version!r}, and a version is a whole number from 1")
        return value

    return accept
