"""The merge-wide majority sign of trimmed task vectors: sgn Σ_p sgn Σ_t τ̂_tp (the authors' TIES code, specs §4d)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergecore.method import Block, Index, Result, Scope, Statistic, Statistics, Summing, TensorInfo
from mergecore.statistics.dropped_norms import drawn_for, drop_statistics
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

    def summing(self, block: Block, statistics: Statistics) -> Summing:
        """Positive minus negative elections."""
        return Summing(_elected, trims(self.threshold, block, statistics))

    def summed(self, state: int, tensor: str, start: int, sums: Sequence[float]) -> int:
        """Those of one more block."""
        return state + int(sums[0])

    def combine(self, left: int, right: int) -> int:
        """The sum."""
        return left + right

    def finish(self, state: int, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Result:
        """{'sum': elections, 'sign': −1, 0 or 1}."""
        return Result({}, {"sum": state, "sign": (state > 0) - (state < 0)})


def _elected(experts: Sequence[Tensor], **trims: Any) -> list[Tensor]:
    return [torch.sign(folded_sum(trimmed_deltas(experts, trims)))]


def trims(threshold: Threshold, block: Block, statistics: Statistics) -> dict[str, Any]:
    """What `trimmed_deltas` needs for a block."""
    held = [threshold_of(found, block.name) for found in statistics["threshold"]]
    found: dict[str, Any] = {
        "least": [least for least, _ in held],
        "drawn": drawn_for(threshold.drop, block, statistics),
    }
    if threshold.count == "exact":
        found |= {"last": [last for _, last in held], "index": Index()}
    return found


def trimmed_deltas(deltas: Sequence[Tensor], trims: Mapping[str, Any]) -> list[Tensor]:
    """The deltas dropped and trimmed, τ̂_t."""
    last = trims.get("last") or [None] * len(deltas)
    return [
        trimmed(delta, least, end, trims.get("index"))
        for delta, least, end in zip(dropped(deltas, trims["drawn"]), trims["least"], last, strict=True)
    ]
