"""Statistics that add up: one float64 sum per result and grid block, folded in order at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from mergecore.plugins.statistic import Look, Statistic, Statistics, Sums
from mergecore.tensors.source import TensorInfo

State = list[tuple[str, int, list[float]]]
"""Tensor, first element and sums of every grid block that was seen."""


class BlockSums(Statistic):
    """Keeps the sums of every grid block: no total depends on which worker saw which. Subclasses say what is summed."""

    looks: ClassVar[frozenset[type[Look]]] = frozenset({Sums})

    def begin(self, selection: Mapping[str, TensorInfo], statistics: Statistics) -> State:
        """Return the state before any block."""
        return []

    def summed(self, state: State, tensor: str, start: int, sums: Sequence[float]) -> State:
        """Add the sums of a block."""
        return [*state, (tensor, start, list(sums))]

    def combine(self, left: State, right: State) -> State:
        """Join both lists."""
        return left + right


def folded(state: State, group: Callable[[str], str] = str) -> dict[str, list[float]]:
    """Return the sums of each tensor, or of each `group` of tensors. Blocks are folded in order of name and start."""
    totals: dict[str, list[float]] = {}
    for name, _, sums in sorted(state):
        before = totals.get(group(name))
        added = sums if before is None else [total + more for total, more in zip(before, sums, strict=True)]
        totals[group(name)] = list(added)
    return totals
