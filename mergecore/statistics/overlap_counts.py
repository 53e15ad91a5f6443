"""How many of each expert's changes it shares with another expert, and how many are its own (RAM, Yuan et al. 2026)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.trims import folded_sum
from mergecore.plugins.block import Block
from mergecore.plugins.statistic import Look, Result, Scope, Statistic, Statistics, Sums
from mergecore.tensors.source import TensorInfo

SHARED, UNIQUE = 0, 1
"""Rows of a tensor's counts."""

State = dict[str, Tensor]


class OverlapCounts(Statistic):
    """Per tensor an int64 (2, T): how many coordinates each expert changes, |τ| > epsilon.

    First those that others change too, then those that none else does. The numbers 'shared' and 'unique' are the sums
    over all tensors.
    """

    name: ClassVar[str] = "overlap_counts"
    scope: ClassVar[Scope] = Scope.POOL
    looks: ClassVar[frozenset[type[Look]]] = frozenset({Sums})

    epsilon: Annotated[float, Field(ge=0, description="a change of at most this size counts as no change")]

    def begin(self, selection: Mapping[str, TensorInfo], statistics: Statistics) -> State:
        """Return the state without counts."""
        return {}

    def look(self, state: Any, block: Block, statistics: Statistics) -> Sums:
        """Count for each expert what it changes, and what it alone changes."""
        return Sums(_changes, {"epsilon": self.epsilon}, 2 * len(block.ids))

    def summed(self, state: State, tensor: str, start: int, sums: Sequence[float]) -> State:
        """Add the counts of a block."""
        every, unique = (torch.tensor([int(count) for count in sums[first::2]]) for first in (0, 1))
        return _added(state, {tensor: torch.stack([every - unique, unique])})

    def combine(self, left: State, right: State) -> State:
        """Add the counts of both."""
        return _added(left, right)

    def finish(self, state: State, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Result:
        """Return counts by tensor, and their sums as numbers."""
        total = sum((state[name] for name in sorted(state)), torch.zeros(2, 1, dtype=torch.int64))
        return Result(state, {"shared": total[SHARED].tolist(), "unique": total[UNIQUE].tolist()})


def _changes(experts: Sequence[Tensor], epsilon: float) -> list[Tensor]:
    changed = [torch.where(delta.abs() > epsilon, 1.0, 0.0) for delta in experts]
    together = folded_sum(changed)
    return [result for own in changed for result in (own, torch.where(together == 1.0, own, 0.0))]


def _added(left: State, right: State) -> State:
    return {**left, **{name: left[name] + value if name in left else value for name, value in right.items()}}
