"""Statistics that add up: one float64 sum per result and block of the grid, folded in order at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from mergecore.plugins.statistic import Look, Statistic, Statistics, Sums
from mergecore.tensors.source import TensorInfo

State = list[tuple[str, int, list[float]]]
"""Tensor, first element and sums of every block that was seen."""


class BlockSums(Statistic):
    """Keeps the sums of every block, so that no total depends on who saw which; a kind of statistic says what is summed."""

    looks: ClassVar[frozenset[type[Look]]] = frozenset({Sums})

    def begin(self, selection: Mapping[str, TensorInfo], statistics: Statistics) -> State:
        """No block seen yet."""
        return []

    def summed(self, state: State, tensor: str, start: int, sums: Sequence[float]) -> State:
        """Those of one more block."""
        return [*state, (tensor, start, list(sums))]

    def combine(self, left: State, right: State) -> State:
        """Both lists."""
        return left + right


def folded(state: State, group: Callable[[str], str] = str) -> dict[str, list[float]]:
    """The sums of each tensor (of each `group` of tensors), blocks folded in order of name and place."""
    found: dict[str, list[float]] = {}
    for name, _, sums in sorted(state):
        before = found.get(group(name))
        added = sums if before is None else [one + more for one, more in zip(before, sums, strict=True)]
        found[group(name)] = list(added)
    return found
