"""Factors by which a task's share of the unified vector changes as much as the task did (EMR, 2024, §4.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.trims import agreeing, elected_sign, largest_magnitude
from mergecore.plugins.block import Block
from mergecore.plugins.statistic import Result, Scope, Statistics, Sums
from mergecore.statistics.block_sums import BlockSums, State, folded
from mergecore.tensors.source import TensorInfo

ZeroSign = Annotated[
    Literal["drop", "negative"],
    Field(
        description=(
            "where the changes cancel exactly: 'drop' shares nothing (sgn 0 = 0); 'negative' takes "
            "the negative changes (the authors' code)"
        )
    ),
]


class UnifiedNorms(BlockSums):
    """'elements': per expert Σ|τ_t| / Σ|M_t ⊙ τ_uni| over the whole selection; 1 where a task has no share.

    'tensors': the same of the means of each tensor, summed, so that every tensor weighs the same. Float64 sums over the
    fixed grid.
    """

    name: ClassVar[str] = "unified_norms"
    scope: ClassVar[Scope] = Scope.POOL

    zero_sign: ZeroSign = "drop"

    def look(self, state: Any, block: Block, statistics: Statistics) -> Sums:
        """Add up both l1 norms of every expert."""
        return Sums(_shares, {"zero_sign": self.zero_sign}, 2 * len(block.ids))

    def finish(self, state: State, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Result:
        """Return the factors as numbers."""
        sums = folded(state)
        whole, kept = ({name: both[first::2] for name, both in sums.items()} for first in (0, 1))
        counts = {name: max(selection[name].count, 1) for name in whole}
        return Result(
            {},
            {
                "elements": _ratios(whole, kept, dict.fromkeys(whole, 1)),
                "tensors": _ratios(whole, kept, counts),
            },
        )


def unified(deltas: Sequence[Tensor], zero_sign: str) -> tuple[Tensor, list[Tensor]]:
    """Return the largest |τ_t| of those with the sign of Σ τ_t, with that sign; and per task where it has that sign."""
    sign = elected_sign(deltas, -1.0 if zero_sign == "negative" else None)
    alike = agreeing(deltas, sign)
    return largest_magnitude(alike) * sign, [delta != 0 for delta in alike]


def _shares(experts: Sequence[Tensor], zero_sign: str) -> list[Tensor]:
    """Return |τ_t| and |M_t ⊙ τ_uni| of every expert."""
    shared, masks = unified(experts, zero_sign)
    pairs = [(delta.abs(), torch.where(mask, shared, 0.0).abs()) for delta, mask in zip(experts, masks, strict=True)]
    return [values for pair in pairs for values in pair]


def _ratios(
    whole: Mapping[str, Sequence[float]], kept: Mapping[str, Sequence[float]], counts: Mapping[str, int]
) -> list[float]:
    totals = [
        [
            sum(by_tensor[name][expert] / counts[name] for name in sorted(by_tensor))
            for expert in range(len(next(iter(by_tensor.values()))))
        ]
        for by_tensor in (whole, kept)
    ]
    return [above / below if below > 0 else 1.0 for above, below in zip(*totals, strict=True)]
