"""By what a task's share of the unified vector must be multiplied to change as much as the task did (EMR, 2024, §4.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.trims import agreeing, elected_sign
from mergecore.plugins.block import Block
from mergecore.plugins.statistic import Result, Scope, Statistics, Sums
from mergecore.statistics.block_sums import BlockSums, State, folded
from mergecore.tensors.source import TensorInfo

ZeroSign = Annotated[
    Literal["drop", "negative"],
    Field(
        description="where the changes cancel exactly: nothing is shared (sgn 0 = 0), or the negative ones (the code)"
    ),
]


class UnifiedNorms(BlockSums):
    """'elements': per expert Σ|τ_t| / Σ|M_t ⊙ τ_uni| over the whole selection; 'tensors': of the means of each tensor, summed,
    so that every tensor weighs the same. Float64 sums over the fixed grid; 1 where a task has no share in the vector."""

    name: ClassVar[str] = "unified_norms"
    scope: ClassVar[Scope] = Scope.POOL

    zero_sign: ZeroSign = "drop"

    def look(self, state: Any, block: Block, statistics: Statistics) -> Sums:
        """Both l1 norms of every expert."""
        return Sums(_shares, {"zero_sign": self.zero_sign}, 2 * len(block.ids))

    def finish(self, state: State, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Result:
        """The factors, blocks folded in order."""
        sums = folded(state)
        whole, kept = ({name: held[first::2] for name, held in sums.items()} for first in (0, 1))
        counts = {name: max(selection[name].count, 1) for name in whole}
        return Result(
            {},
            {
                "elements": _ratios(whole, kept, dict.fromkeys(whole, 1)),
                "tensors": _ratios(whole, kept, counts),
            },
        )


def unified(deltas: Sequence[Tensor], zero_sign: str) -> tuple[Tensor, list[Tensor]]:
    """The largest |τ_t| among those with the sign of Σ τ_t, with that sign; and per task where it has that sign."""
    sign = elected_sign(deltas, -1.0 if zero_sign == "negative" else None)
    alike = agreeing(deltas, sign)
    largest = alike[0].abs()
    for delta in alike[1:]:
        largest = torch.maximum(largest, delta.abs())
    return largest * sign, [delta != 0 for delta in alike]


def _shares(experts: Sequence[Tensor], zero_sign: str) -> list[Tensor]:
    """Per expert |τ_t| and |M_t ⊙ τ_uni|."""
    shared, masks = unified(experts, zero_sign)
    pairs = [(delta.abs(), torch.where(mask, shared, 0.0).abs()) for delta, mask in zip(experts, masks, strict=True)]
    return [one for pair in pairs for one in pair]


def _ratios(
    whole: Mapping[str, Sequence[float]], kept: Mapping[str, Sequence[float]], counts: Mapping[str, int]
) -> list[float]:
    totals = [
        [
            sum(held[name][expert] / counts[name] for name in sorted(held))
            for expert in range(len(next(iter(held.values()))))
        ]
        for held in (whole, kept)
    ]
    return [above / below if below > 0 else 1.0 for above, below in zip(*totals, strict=True)]
