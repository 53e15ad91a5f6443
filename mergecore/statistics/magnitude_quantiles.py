"""The magnitudes between which a task vector is clipped: |τ| at quantiles of both ends (PCB-Merging's code, 2024).

Exact, by radix selection: the profile is the first reading, and a second one finds both values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import floor
from typing import Annotated, ClassVar

from pydantic import Field

from mergecore.plugins.block import Block
from mergecore.plugins.statistic import Counts, Look, Result, Scope, SparseCounts, Statistic, Statistics
from mergecore.statistics.profile import Profile, fine_counts, magnitudes
from mergecore.statistics.radix import OrderStatistic, value_of
from mergecore.tensors.source import TensorInfo

State = list[OrderStatistic]


class MagnitudeQuantiles(Statistic):
    """sorted(|τ|)[⌊d·tail⌋] and sorted(|τ|)[⌊d·(1−tail)−1⌋] over the d elements of the selection; 'low' and 'high'."""

    name: ClassVar[str] = "magnitude_quantiles"
    scope: ClassVar[Scope] = Scope.EXPERT
    looks: ClassVar[frozenset[type[Look]]] = frozenset({Counts})

    tail: Annotated[float, Field(ge=0, lt=0.5, description="share beyond each of the two; 0: smallest and largest")]

    def statistics(self) -> dict[str, Statistic]:
        """Return the profile."""
        return {"profile": Profile()}

    def ranks(self, total: int) -> tuple[int, int]:
        """Return the ranks of the upper and the lower value among `total`, counted from the largest."""
        share = Fraction(str(self.tail))
        low = floor(total * share)
        high = max(int(total * (1 - share) - 1), low)
        return total - high, total - low

    def begin(self, selection: Mapping[str, TensorInfo], statistics: Statistics) -> State | Result:
        """Find both values from the profile, or their bins."""
        total = sum(info.count for info in selection.values())
        counts = list(fine_counts(statistics["profile"][0], selection).values())
        state = [OrderStatistic(rank) for rank in self.ranks(total)] if total else []
        for wanted in state:
            wanted.locate_fine(counts)
        return state if any(wanted.left for wanted in state) else self.finish(state, selection, statistics)

    def look(self, state: State, block: Block, statistics: Statistics) -> Counts:
        """Count the low half-words inside both bins."""
        return Counts(magnitudes, {"drawn": None}, 1, (tuple(wanted.bin for wanted in state),))

    def counted(self, state: State, tensor: str, counts: Sequence[SparseCounts]) -> State:
        """Add the counts. Both values may lie in one bin."""
        for wanted in state:
            wanted.counted(counts[0] if wanted.bin == state[0].bin else counts[1])
        return state

    def combine(self, left: State, right: State) -> State:
        """Add the counts of both."""
        for ours, theirs in zip(left, right, strict=True):
            ours.join(theirs)
        return left

    def finish(self, state: State, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Result:
        """Return the numbers {'low', 'high'}, float32 values; 0 where the selection is empty."""
        high, low = [value_of(wanted.value) for wanted in state] or [0.0, 0.0]
        return Result({}, {"low": low, "high": high})
