"""Per tensor the factor that gives a randomly dropped delta its l1 norm back (mergekit's DARE rescale)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from mergecore.method import Block, Result, Scope, Statistic, Statistics, TensorInfo
from mergecore.trims import RandomDrop

State = list[tuple[str, int, float, float]]


class DroppedNorms(Statistic):
    """factor[tensor] = ‖τ‖₁ / ‖τ after the drop‖₁ (1 where nothing is left), float64 sums over the fixed grid."""

    name: ClassVar[str] = "dropped_norms"
    scope: ClassVar[Scope] = Scope.EXPERT
    whole: ClassVar[bool] = True

    drop: RandomDrop

    def begin(self, selection: Mapping[str, TensorInfo], statistics: Statistics) -> State:
        """No block seen yet."""
        return []

    def add(self, state: State, block: Block, statistics: Statistics) -> State:
        """Both l1 norms of the block."""
        magnitude = block.experts[0].abs()
        kept = self.drop.kept(block.ids[0], block.name, block.start, magnitude.numel(), magnitude.device)
        whole = float(magnitude.sum(dtype=torch.float64))
        left = float(torch.where(kept, magnitude, 0.0).sum(dtype=torch.float64))
        return [*state, (block.name, block.start, whole, left)]

    def combine(self, left: State, right: State) -> State:
        """Both lists."""
        return left + right

    def finish(self, state: State, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Result:
        """{'factor': {tensor: ratio}} as numbers, blocks folded in order."""
        sums: dict[str, tuple[float, float]] = {}
        for name, _, whole, left in sorted(state):
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + whole, before[1] + left)
        factor: dict[str, Any] = {name: whole / left if left else 1.0 for name, (whole, left) in sums.items()}
        return Result({}, {"factor": factor})


def l1_factors(drop: RandomDrop | None, statistics: Statistics, tensor: str) -> list[float] | None:
    """Per expert the factor of one tensor, None where the drop rescales by 1/(1−rate)."""
    if drop is None or drop.rescale == "inverse":
        return None
    return [float(found.numbers["factor"].get(tensor, 1.0)) for found in statistics["drop"]]


def drop_statistics(drop: RandomDrop | None) -> dict[str, Statistic]:
    """What a drop must know beforehand."""
    return {"drop": DroppedNorms(drop=drop)} if drop is not None and drop.rescale == "l1" else {}
