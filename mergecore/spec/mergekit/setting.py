"""What a parameter can be in mergekit: a value, a gradient over layers, or such values behind filters over tensor
names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergecore.errors import SpecError, nearest

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Case:
    """Values for the tensors whose name holds `filter` (None: all). One value, or several spread evenly over layers."""

    filter: str | None
    values: tuple[Scalar, ...]
    gradient: bool

    def matches(self, tensor: str) -> bool:
        """Whether the case speaks of this tensor."""
        return self.filter is None or self.filter in tensor

    def at(self, depth: float) -> float | bool | str:
        """The value at a depth from 0 (first layer) to 1 (last layer): numbers in between are interpolated.

        Switches (true, false) and words are not mixed: the one whose stretch has begun holds.
        """
        position = depth * (len(self.values) - 1)
        below = int(position)
        numbers = [value for value in self.values if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(numbers) < len(self.values) or len(numbers) == 1:
            return self.values[below]
        above = min(below + 1, len(numbers) - 1)
        share = position - below
        return float((1 - share) * numbers[below] + share * numbers[above])


Setting = tuple[Case, ...]
"""Of several cases the first that matches a tensor decides."""
Settings = Mapping[str, Setting]


def setting_from(value: Any, read: Callable[[Any], Scalar], where: str) -> Setting:
    """The cases that a parameter's YAML stands for. read: turns one scalar into a value or raises ValueError.

    Raises SpecError naming the place.
    """
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise SpecError(f"{where}: is an empty list; give a value, or leave the parameter out")
    conditional = [isinstance(entry, Mapping) for entry in entries]
    if any(conditional) and not all(conditional):
        raise SpecError(f"{where}: mixes plain values with {{filter, value}} entries; use one or the other")
    if all(conditional):
        return tuple(_case(entry, read, f"{where}[{number}]") for number, entry in enumerate(entries))
    return (_values(None, value, read, where),)


def _case(entry: Mapping[str, Any], read: Callable[[Any], Scalar], where: str) -> Case:
    for key in entry:
        if key not in ("filter", "value"):
            raise SpecError(f"{where}.{key}: unknown key; {nearest(str(key), ('filter', 'value'))}")
    if "value" not in entry:
        raise SpecError(f"{where}.value: must be given")
    chosen = entry.get("filter")
    if chosen is not None and not isinstance(chosen, str):
        raise SpecError(f"{where}.filter: must be text, a part of a tensor's name (given: {chosen!r})")
    return _values(None if chosen == "*" else chosen, entry["value"], read, f"{where}.value")


def _values(chosen: str | None, value: Any, read: Callable[[Any], Scalar], where: str) -> Case:
    gradient = isinstance(value, list)
    values = value if gradient else [value]
    if not values:
        raise SpecError(f"{where}: is an empty list; give at least one value")
    try:
        return Case(chosen, tuple(read(item) for item in values), gradient)
    except ValueError as error:
        raise SpecError(f"{where}: {error}") from None


def value_for(sources: Iterator[Settings], name: str, tensor: str, depth: float) -> Scalar | None:
    """The value of a parameter for a tensor: of the sources, nearest first, the first that has a case for it."""
    for settings in sources:
        for case in settings.get(name, ()):
            if case.matches(tensor):
                return case.at(depth)
    return None


def filters_of(settings: Settings) -> list[str]:
    """Every filter that stands in the settings, in order."""
    return [case.filter for setting in settings.values() for case in setting if case.filter is not None]
