"""Per expert the largest balancing score β and the smallest that survives the drop (PCB-Merging, Du et al. 2024, §3.2).

The quantile of β is taken over all coordinates of the model: two scans, as β is worked out anew from the same coordinate
of every task vector. The statistic and the merge work it out by the same correctly rounded operations, to the same bit.
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
    """Per expert the counts of β's high half-words; then the two order statistics wanted: the largest β and the cut."""

    high: list[SparseCounts | None]
    wanted: list[tuple[OrderStatistic, OrderStatistic]] = field(default_factory=list)


class BalanceCut(Statistic):
    """'high': each expert's largest β; 'low': its sorted(β)[⌊d(1−density)⌋], d elements of the selection."""

    name: ClassVar[str] = "balance_cut"
    scope: ClassVar[Scope] = Scope.POOL
    looks: ClassVar[frozenset[type[Look]]] = frozenset({Counts})

    form: Form
    density: Annotated[float, Field(gt=0, le=1)]
    clip: Annotated[float, Field(ge=0, lt=0.5)]

    def statistics(self) -> dict[str, Statistic]:
        """What the scores are normalised by."""
        if self.form == "paper":
            return {"softmax": SoftmaxMeans()}
        return {"quantiles": MagnitudeQuantiles(tail=self.clip)}

    @property
    def readings(self) -> int:
        """High half-words, then low ones."""
        return 2

    def begin(self, selection: Mapping[str, TensorInfo], statistics: Statistics) -> CutState:
        """Nothing counted."""
        return CutState([])

    def look(self, state: CutState, block: Block, statistics: Statistics) -> Counts:
        """Of every expert's score the high half-words in the first scan, low ones inside the wanted bins in the second."""
        count = len(block.ids)
        arguments = {"balancing": balancing(self.form, count, statistics)}
        bins = tuple((high.bin, low.bin) for high, low in state.wanted) if state.wanted else None
        return Counts(_patterns, arguments, count, bins)

    def counted(self, state: CutState, tensor: str, counts: Sequence[SparseCounts]) -> CutState:
        """Counts added; both values may lie in one bin, whose counts then come first."""
        for position, (high, low) in enumerate(state.wanted):
            high.counted(counts[2 * position])
            low.counted(counts[2 * position if low.bin == high.bin else 2 * position + 1])
        if not state.wanted:
            state.high = [joined(old, new) for old, new in zip(state.high or [None] * len(counts), counts, strict=True)]
        return state

    def combine(self, left: CutState, right: CutState) -> CutState:
        """Counts added."""
        if not left.high or not right.high:
            left.high = left.high or right.high
        else:
            left.high = [joined(a, b) for a, b in zip(left.high, right.high, strict=True) if b is not None]
        for ours, theirs in zip(left.wanted, right.wanted, strict=True):
            for order, other in zip(ours, theirs, strict=True):
                order.join(other)
        return left

    def finish(self, state: CutState, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Result | Rescan:
        """After the first scan the bins and the wish for the second, then {'low', 'high'}."""
        if state.high:
            total = sum(info.count for info in selection.values())
            rank = total - floor(total * (1 - Fraction(str(self.density))))
            again = CutState([], [(OrderStatistic(1), OrderStatistic(rank)) for _ in state.high])
            for counts, wanted in zip(state.high, again.wanted, strict=True):
                for order in wanted:
                    order.locate([counts] if counts else [])
            return Rescan(again)
        high, low = ([value_of(wanted[place].value) for wanted in state.wanted] for place in (0, 1))
        return Result({}, {"low": low, "high": high})


def _patterns(experts: Sequence[Tensor], balancing: Balancing) -> list[Tensor]:
    """Every expert's score as an int32 that grows with it."""
    return [signed_bits(score) for score in scores(experts, balancing)]
