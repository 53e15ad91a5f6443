"""Σ τ̂² of every expert's trimmed task vector, by which its changes are divided in two of TIES' sign elections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from mergecore.plugins.block import Block
from mergecore.plugins.statistic import Result, Scope, Statistic, Statistics, Sums
from mergecore.statistics.block_sums import BlockSums, State, folded
from mergecore.statistics.threshold import Threshold, Trims, trim_statistics, trimmed_deltas, trims
from mergecore.tensors.source import TensorInfo


class TrimmedNorms(BlockSums):
    """squares[t] = ‖τ̂_t‖₂² over the whole selection, float64 products and sums over the fixed grid."""

    name: ClassVar[str] = "trimmed_norms"
    scope: ClassVar[Scope] = Scope.POOL

    threshold: Threshold

    def statistics(self) -> dict[str, Statistic]:
        """Return what the trims need."""
        return trim_statistics(self.threshold)

    def look(self, state: Any, block: Block, statistics: Statistics) -> Sums:
        """Add up the square of every expert."""
        return Sums(_squares, {"trims": trims(self.threshold, block, statistics)}, len(block.ids))

    def finish(self, state: State, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Result:
        """Return the numbers {'squares': one per expert}."""
        return Result({}, {"squares": folded(state, lambda name: "").get("", [])})


def _squares(experts: Sequence[Tensor], trims: Trims) -> list[Tensor]:
    wide = [delta.double() for delta in trimmed_deltas(experts, trims)]
    return [values * values for values in wide]


def shares_of(statistics: Statistics, count: int) -> list[float]:
    """Return 1/‖τ̂_t‖² of every expert, 0 where nothing of it is left."""
    squares = statistics["norms"][0].numbers["squares"] or [0.0] * count
    return [1.0 / square if square > 0 else 0.0 for square in squares]
