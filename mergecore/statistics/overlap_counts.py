"""How many of each expert's changes it shares with another expert, and how many are its own (RAM, Yuan et al. 2026)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergecore.method import Block, Result, Scope, Statistic, Statistics, TensorInfo
from mergecore.trims import folded_sum

SHARED, UNIQUE = 0, 1
"""Rows of a tensor's counts."""

State = dict[str, Tensor]


class OverlapCounts(Statistic):
    """Per tensor an int64 (2, T): each expert's coordinates with |τ| > epsilon that others change too, and those that none
    does. The numbers 'shared' and 'unique' are their sums over all tensors."""

    name: ClassVar[str] = "overlap_counts"
    scope: ClassVar[Scope] = Scope.POOL

    epsilon: Annotated[float, Field(ge=0, description="changes of at most this size count as none")]

    def begin(self, selection: Mapping[str, TensorInfo], statistics: Statistics) -> State:
        """Nothing counted."""
        return {}

    def add(self, state: State, block: Block, statistics: Statistics) -> State:
        """The counts of one more block."""
        changed = [(delta.abs() > self.epsilon).to(torch.int32) for delta in block.experts]
        together = folded_sum(changed)
        own = [(one == 1) & (together == 1) for one in changed]
        unique = torch.tensor([int(one.sum()) for one in own])
        every = torch.tensor([int(one.sum()) for one in changed])
        return _added(state, {block.name: torch.stack([every - unique, unique])})

    def combine(self, left: State, right: State) -> State:
        """Sums."""
        return _added(left, right)

    def finish(self, state: State, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Result:
        """Counts by tensor, and their sums."""
        total = sum((state[name] for name in sorted(state)), torch.zeros(2, 1, dtype=torch.int64))
        return Result(state, {"shared": total[SHARED].tolist(), "unique": total[UNIQUE].tolist()})


def _added(left: State, right: State) -> State:
    return {**left, **{name: left[name] + value if name in left else value for name, value in right.items()}}
