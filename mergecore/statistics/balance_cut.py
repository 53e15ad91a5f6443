"""Per expert the largest balancing score β and the smallest that survives the drop (PCB-Merging, Du et al. 2024, §3.2).

The quantile of β is taken over all coordinates of the model, in two readings. Each reading works β out again from the
task vectors. The statistic and the merge use the same correctly rounded operations, so that β is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from mergecore.plugins.block import Block
from mergecore.plugins.statistic import Counts, Look, Rescan, Result, Scope, SparseCounts, Statistic, Statistics
from mergecore.statistics.balance_scores import Balancing, Form, balancing, scores
from mergecore.statistics.magnitude_quantiles import MagnitudeQuantiles
from mergecore.statistics.radix import OrderStatistic, joined, signed_bits, value_of
from mergecore.statistics.softmax_means import SoftmaxMeans
from mergecore.tensors.source import TensorInfo


@dataclass
class CutState:
    """high: per expert the counts of β's high half-words. wanted, in the second reading: the largest β and the cut."""

    high: list[SparseCounts | None]
    wanted: list[tuple[OrderStatistic, OrderStatistic]] = field(default_factory=list)


class BalanceCut(Statistic):
    """Finds each expert's largest β, 'high', and its sorted(β)[⌊d(1−density)⌋], 'low'; d elements of the selection."""

    name: ClassVar[str] = "balance_cut"
    scope: ClassVar[Scope] = Scope.POOL
    looks: ClassVar[frozenset[type[Look]]] = frozenset({Counts})

    form: Form
    density: Annotated[float, Field(gt=0, le=1)]
    clip: Annotated[float, Field(ge=0, lt=0.5)]

    def statistics(self) -> dict[str, Statistic]:
        """Return what the scores are normalised by."""
        if self.form == "paper":
            return {"softmax": SoftmaxMeans()}
        return {"quantiles": MagnitudeQuantiles(tail=self.clip)}

    @property
    def readings(self) -> int:
        """Two: high half-words, then low ones."""
        return 2

    def begin(self, selection: Mapping[str, TensorInfo], statistics: Statistics) -> CutState:
        """Return the state without counts."""
        return CutState([])

    def look(self, state: CutState, block: Block, statistics: Statistics) -> Counts:
        """Count the high half-words of every expert's score; in the second reading the low ones in the wanted bins."""
        count = len(block.ids)
        arguments = {"balancing": balancing(self.form, count, statistics)}
        bins = tuple((high.bin, low.bin) for high, low in state.wanted) if state.wanted else None
        return Counts(_patterns, arguments, count, bins)

    def counted(self, state: CutState, tensor: str, counts: Sequence[SparseCounts]) -> CutState:
        """Add the counts. Both values may lie in one bin, whose counts then come first."""
        for position, (high, low) in enumerate(state.wanted):
            high.counted(counts[2 * position])
            low.counted(counts[2 * position if low.bin == high.bin else 2 * position + 1])
        if not state.wanted:
            state.high = [joined(old, new) for old, new in zip(state.high or [None] * len(counts), counts, strict=True)]
        return state

    def combine(self, left: CutState, right: CutState) -> CutState:
        """Add the counts of both."""
        if not left.high or not right.high:
            left.high = left.high or right.high
        else:
            left.high = [joined(a, b) for a, b in zip(left.high, right.high, strict=True) if b is not None]
        for ours, theirs in zip(left.wanted, right.wanted, strict=True):
            for order, other in zip(ours, theirs, strict=True):
                order.join(other)
        return left

    def finish(self, state: CutState, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Result | Rescan:
        """Return the wish to read again with the bins after the first reading, then {'low', 'high'}."""
        if state.high:
            total = sum(info.count for info in selection.values())
            rank = total - floor(total * (1 - Fraction(str(self.density))))
            again = CutState([], [(OrderStatistic(1), OrderStatistic(rank)) for _ in state.high])
            for counts, wanted in zip(state.high, again.wanted, strict=True):
                for order in wanted:
                    order.locate([counts] if counts else [])
            return Rescan(again)
        high, low = ([value_of(wanted[which].value) for wanted in state.wanted] for which in (0, 1))
        return Result({}, {"low": low, "high": high})


def _patterns(experts: Sequence[Tensor], balancing: Balancing) -> list[Tensor]:
    """Return every expert's score as an int32 that grows with it."""
    return [signed_bits(score) for score in scores(experts, balancing)]
