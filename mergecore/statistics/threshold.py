"""The exact magnitude threshold of a task vector at a density, without sorting: radix selection in two scans.

TIES (Yadav et al. 2023, §3.1 trim). The profile is the first scan; here a second counts the low half-words inside the
bin that holds the wanted rank, which gives the r-th largest |τ| to the last bit and how many are above and at it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mergecore.kernels.run import materialised
from mergecore.method import (
    Block,
    Counting,
    Found,
    Rescan,
    Result,
    Scope,
    Sparse,
    Statistic,
    Statistics,
    TensorInfo,
)
from mergecore.statistics.dropped_norms import drawn_for, drop_statistics
from mergecore.statistics.profile import Profile, high_counts, magnitudes
from mergecore.statistics.radix import OrderStatistic, value_of
from mergecore.trims import RandomDrop, Shares

Count = Literal["at_least", "exact", "published"]
ANY = 1 << 62
"""A flat index that no tensor has: everything comes before it."""


@dataclass
class Group:
    """One ranking over all tensors together, or over one of them; `order` finds its threshold."""

    tensors: frozenset[str]
    total: int
    order: OrderStatistic
    needed: int = 0
    """How many of the elements exactly at the threshold are still to be kept (count exact)."""
    cut: tuple[str, int] | None = None
    """Tensor and flat index of the last element at the threshold that is kept; None where all of them are."""
    ties: dict[int, int] = field(default_factory=dict)
    block: int = -1


@dataclass
class ThresholdState:
    """The groups, and which of the scans is under way: 'low', 'count' or 'locate'."""

    groups: list[Group]
    scan: str = "low"

    def group_of(self, tensor: str) -> Group:
        """The group that ranks this tensor."""
        return self.groups[0] if len(self.groups) == 1 else next(g for g in self.groups if tensor in g.tensors)


class Threshold(Statistic):
    """The r-th largest |τ| of one expert, r = ⌊density · d⌋, d = elements of the selection (or of each tensor).

    count 'at_least' and 'published' keep |τ| ≥ threshold (published: r = int(d·density) + 1, as the authors' code
    does); 'exact' keeps exactly r: of those at the threshold the first by (tensor name, flat index). numbers: 'kept',
    'of', 'density' = kept/of, and per group the bit pattern of the threshold, how many are above and at it, the cut.
    """

    name: ClassVar[str] = "threshold"
    scope: ClassVar[Scope] = Scope.EXPERT

    density: Shares
    ranked: Literal["global", "tensor"] = "global"
    count: Count = "at_least"
    least: Annotated[int, Field(ge=0)] = 0
    """At least so many elements of each ranking are wanted, where the density is above 0."""
    drop: RandomDrop | None = None

    def of_expert(self, position: int) -> Threshold:
        """With the expert's own density and rate."""
        if not isinstance(self.density, tuple) and (self.drop is None or self.drop.of_expert(position) is self.drop):
            return self
        density = self.density[position] if isinstance(self.density, tuple) else self.density
        return self.model_copy(update={"density": density, "drop": self.drop and self.drop.of_expert(position)})

    def statistics(self) -> dict[str, Statistic]:
        """The profile of the same delta."""
        return {"profile": Profile(drop=self.drop), **drop_statistics(self.drop)}

    @property
    def readings(self) -> int:
        """Once; twice more for the few tensors in which the last element to keep is to be found."""
        return 3 if self.count == "exact" else 1

    def rank(self, total: int) -> int:
        """How many of `total` elements are wanted."""
        assert not isinstance(self.density, tuple)
        if self.count == "published":
            return min(int(total * self.density) + 1, total)
        wanted = floor(Fraction(str(self.density)) * total)
        return max(wanted, min(self.least, total)) if self.density > 0 else wanted

    def begin(self, selection: Mapping[str, TensorInfo], statistics: Statistics) -> ThresholdState:
        """Find each group's bin from the profile."""
        counts = high_counts(statistics["profile"][0], selection)
        members = (
            [frozenset(selection)] if self.ranked == "global" else [frozenset([name]) for name in sorted(selection)]
        )
        groups = []
        for tensors in members:
            total = sum(selection[name].count for name in tensors)
            group = Group(tensors, total, OrderStatistic(self.rank(total)))
            if group.order.rank > 0:
                group.order.locate(counts[name] for name in tensors)
            groups.append(group)
        return ThresholdState(groups)

    def counting(self, state: ThresholdState, block: Block, statistics: Statistics) -> Counting | None:
        """In the first scan the low half-words inside the bin."""
        if state.scan != "low":
            return None
        order = state.group_of(block.name).order
        arguments = {"drawn": drawn_for(self.drop, block, statistics)}
        return Counting(magnitudes, arguments, 1, ((order.bin,),) if order.rank else ())

    def counted(self, state: ThresholdState, tensor: str, counts: Sequence[Sparse]) -> ThresholdState:
        """The group's counts; by tensor only where the one that holds the cut will be looked for."""
        state.group_of(tensor).order.counted(tensor if self.count == "exact" else "", counts[0])
        return state

    def add(self, state: ThresholdState, block: Block, statistics: Statistics) -> ThresholdState:
        """For count exact: where in its tensor, then where in its block the last one kept lies."""
        group = state.group_of(block.name)
        if group.cut is None or block.name != group.cut[0]:
            return state
        deltas = [delta.reshape(-1) for delta in block.experts]
        arguments = {"drawn": drawn_for(self.drop, block, statistics)}
        pattern = magnitudes(deltas, **materialised(arguments, block.start, deltas[0].numel(), deltas[0].device))[0]
        if state.scan == "count":
            group.ties[block.start] = int((pattern == group.order.value).sum())
        elif block.start == group.block:
            position = int((pattern == group.order.value).nonzero()[group.needed - 1])
            group.cut = (block.name, block.start + position)
        return state

    def combine(self, left: ThresholdState, right: ThresholdState) -> ThresholdState:
        """Join what two workers counted."""
        for ours, theirs in zip(left.groups, right.groups, strict=True):
            if left.scan == "low":
                ours.order.join(theirs.order)
            ours.ties.update(theirs.ties)
            if ours.cut and theirs.cut and theirs.cut[1] > ours.cut[1]:
                ours.cut = theirs.cut
        return left

    def finish(
        self, state: ThresholdState, selection: Mapping[str, TensorInfo], statistics: Statistics
    ) -> Result | Rescan:
        """The thresholds; for count exact first two more scans of the tensors in which a cut lies."""
        for group in state.groups:
            if group.order.rank and state.scan == "low":
                self._settle(group)
            elif group.cut and state.scan == "count":
                _descend(group)
        waiting = tuple(sorted(group.cut[0] for group in state.groups if group.cut))
        if waiting and state.scan != "locate":
            return Rescan(ThresholdState(state.groups, {"low": "count", "count": "locate"}[state.scan]), waiting)
        return Result({}, self._numbers(state))

    def _settle(self, group: Group) -> None:
        """Fix the threshold from the low half-words, and for count exact the tensor in which the last one kept lies."""
        order = group.order
        order.settle()
        group.needed = order.rank - order.above
        if self.count != "exact" or group.needed == order.equal():
            return
        for name in sorted(order.low):
            here = int(order.low[name][1].sum())
            if group.needed <= here:
                group.cut = (name, -1)
                return
            group.needed -= here

    def _numbers(self, state: ThresholdState) -> dict[str, Any]:
        orders = [group.order for group in state.groups]
        kept = [order.rank if self.count == "exact" else order.above + order.equal() for order in orders]
        groups = [
            {
                "bits": group.order.value,
                "above": group.order.above,
                "equal": group.order.equal(),
                "cut": list(group.cut) if group.cut else None,
                "kept": here,
            }
            for group, here in zip(state.groups, kept, strict=True)
        ]
        of = sum(group.total for group in state.groups)
        names = None if self.ranked == "global" else [next(iter(group.tensors)) for group in state.groups]
        share = sum(kept) / of if of else 0.0
        return {"groups": groups, "tensors": names, "kept": sum(kept), "of": of, "density": share}


def _descend(group: Group) -> None:
    """From the ties per block to the block in which the last one kept lies."""
    for start in sorted(group.ties):
        if group.needed <= group.ties[start]:
            group.block = start
            return
        group.needed -= group.ties[start]


def threshold_of(found: Found, tensor: str) -> tuple[float, int]:
    """(threshold, last) for one tensor: keep |τ| > threshold, and at it up to flat index `last` (ANY: all of them).

    The threshold is a float32 number, infinite where nothing is kept.
    """
    groups, names = found.numbers["groups"], found.numbers["tensors"]
    group = groups[0] if names is None else groups[names.index(tensor)]
    if group["bits"] < 0:
        return float("inf"), ANY
    value = value_of(group["bits"])
    if group["cut"] is None:
        return value, ANY
    name, index = group["cut"]
    return value, index if tensor == name else (ANY if tensor < name else -1)
