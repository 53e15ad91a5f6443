"""The merge-wide majority sign of trimmed task vectors: sgn Σ_p sgn Σ_t τ̂_tp (the authors' TIES code, specs §4d)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from mergecore.arithmetic.trims import Elect, elected_sign
from mergecore.plugins.block import Block
from mergecore.plugins.statistic import Look, Result, Scope, Statistic, Statistics, Sums
from mergecore.statistics.threshold import Threshold, Trims, trim_statistics, trimmed_deltas, trims
from mergecore.statistics.trimmed_norms import TrimmedNorms, shares_of
from mergecore.tensors.source import TensorInfo


class SignMajority(Statistic):
    """Which sign the larger number of coordinates elect; it decides where the trimmed values cancel exactly."""

    name: ClassVar[str] = "sign_majority"
    scope: ClassVar[Scope] = Scope.POOL
    looks: ClassVar[frozenset[type[Look]]] = frozenset({Sums})

    threshold: Threshold
    elect: Elect = "mass"

    def statistics(self) -> dict[str, Statistic]:
        """Return what the trims need, and the norms where signs are elected by them."""
        norms: dict[str, Statistic] = {} if self.elect == "mass" else {"norms": TrimmedNorms(threshold=self.threshold)}
        return {**trim_statistics(self.threshold), **norms}

    def begin(self, selection: Mapping[str, TensorInfo], statistics: Statistics) -> int:
        """Return no elections."""
        return 0

    def look(self, state: Any, block: Block, statistics: Statistics) -> Sums:
        """Add up positive minus negative elections."""
        shares = None if self.elect == "mass" else shares_of(statistics, len(block.ids))
        arguments = {"trims": trims(self.threshold, block, statistics), "elect": self.elect, "shares": shares}
        return Sums(_elected, arguments)

    def summed(self, state: int, tensor: str, start: int, sums: Sequence[float]) -> int:
        """Add the elections of a block."""
        return state + int(sums[0])

    def combine(self, left: int, right: int) -> int:
        """Add both."""
        return left + right

    def finish(self, state: int, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Result:
        """Return the numbers {'sum': elections, 'sign': −1, 0 or 1}."""
        return Result({}, {"sum": state, "sign": (state > 0) - (state < 0)})


def _elected(experts: Sequence[Tensor], trims: Trims, elect: Elect, shares: Sequence[float] | None) -> list[Tensor]:
    return [elected_sign(trimmed_deltas(experts, trims), None, elect, shares)]


def majority_sign(statistics: Statistics) -> float:
    """Return the sign of coordinates whose trimmed values cancel exactly, from the result "majority".

    A majority of 0 leaves the sign at 0. The authors' selector then takes the negatives (specs §4d).
    """
    return float(statistics["majority"][0].numbers["sign"]) or -1.0
