"""How many cells a spec comes to, counted before any is made: grids multiply, and a few lines can mean millions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from mergecore.errors import SpecError


def check_cells(
    entries: Sequence[Mapping[str, Any]],
    select: Sequence[Mapping[str, Any]],
    counts: Sequence[int],
    per_count: int,
    most: int,
) -> None:
    """Raise SpecError where grids × counts × subsets are more cells than `most`. Searched entries count as one."""
    total = 0
    for position, entry in enumerate(entries):
        own = entry.get("counts")
        drawings = len(own if isinstance(own, list | tuple) else counts) * per_count
        written = {key: value for key, value in entry.items() if key not in ("counts", "search")}
        cells = combinations(written) * (1 if "select" in entry else combinations(select)) * drawings
        total += cells
        if total > most:
            raise SpecError(
                f"methods[{position}]: this entry alone comes to {_told(cells)} cells (values × counts × subsets), all "
                f"so far to {_told(total)}, and run.most_cells is {most:,}; write fewer values or subsets, or raise it"
            )


def combinations(value: Any) -> int:
    """Return how many combinations the grids inside a value have, as `variants.expanded` makes them."""
    if isinstance(value, Mapping):
        if isinstance(choices := value.get("grid"), list | tuple):
            return sum(map(combinations, choices))
        return prod(map(combinations, value.values()))
    return prod(map(combinations, value)) if isinstance(value, list | tuple) else 1


def _told(count: int) -> str:
    return f"{count:,}" if count < 10**15 else "more than 10^15"
