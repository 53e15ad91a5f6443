"""The merge-wide majority sign of trimmed task vectors: sgn Σ_p sgn Σ_t τ̂_tp (the authors' TIES code, specs §4d)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from mergecore.method import Block, Result, Scope, Statistic, Statistics, TensorInfo
from mergecore.statistics.dropped_norms import drop_statistics, l1_factors
from mergecore.statistics.threshold import Threshold, threshold_of
from mergecore.trims import dropped, folded_sum, trimmed


class SignMajority(Statistic):
    """Which sign the larger number of coordinates elect; it decides where the trimmed values cancel exactly."""

    name: ClassVar[str] = "sign_majority"
    scope: ClassVar[Scope] = Scope.POOL

    threshold: Threshold

    def statistics(self) -> dict[str, Statistic]:
        """Each expert's threshold, and the l1 factors of the drop where it has them."""
        return {"threshold": self.threshold, **drop_statistics(self.threshold.drop)}

    def begin(self, selection: Mapping[str, TensorInfo], statistics: Statistics) -> int:
        """Zero."""
        return 0

    def add(self, state: int, block: Block, statistics: Statistics) -> int:
        """Positive minus negative elections of the block."""
        total = folded_sum(trimmed_deltas(self.threshold, block, statistics))
        return state + int(torch.sign(total).sum(dtype=torch.float64))

    def combine(self, left: int, right: int) -> int:
        """The sum."""
        return left + right

    def finish(self, state: int, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Result:
        """{'sum': elections, 'sign': −1, 0 or 1}."""
        return Result({}, {"sum": state, "sign": (state > 0) - (state < 0)})


def trimmed_deltas(threshold: Threshold, block: Block, statistics: Statistics) -> list[torch.Tensor]:
    """The block's deltas dropped and trimmed, τ̂_t."""
    deltas = dropped(threshold.drop, block, l1_factors(threshold.drop, statistics, block.name))
    held = [threshold_of(found, block.name) for found in statistics["threshold"]]
    return [trimmed(delta, value, cut, block.start) for delta, (value, cut) in zip(deltas, held, strict=True)]
