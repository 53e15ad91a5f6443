"""The exact magnitude threshold of a task vector at a density, without sorting: radix selection in two scans.

TIES (Yadav et al. 2023, §3.1 trim). The profile is the first reading. Where it does not tell the value, a second
reading counts the low half-words inside the bin of the wanted rank: this gives the r-th largest |τ| to the last bit,
and how many are above and at it.
"""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from math import floor
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.trims import Drawn, RandomDrop, Shares, dropped, trimmed
from mergecore.engine.kernels.run import materialised
from mergecore.plugins.block import Block, flat_index
from mergecore.plugins.statistic import (
    Blocks,
    Counts,
    Found,
    Look,
    Rescan,
    Result,
    Scope,
    SparseCounts,
    Statistic,
    Statistics,
    Sums,
)
from mergecore.statistics.dropped_norms import drawn_for, drop_statistics
from mergecore.statistics.profile import Profile, fine_counts, magnitudes
from mergecore.statistics.radix import OrderStatistic, value_of
from mergecore.tensors.source import TensorInfo

Count = Literal["at_least", "exact", "published"]
WINDOW = 1 << 16
"""Elements of a window: count 'exact' counts those at the threshold per window, then looks into one window."""
ANY = 1 << 62
"""A flat index above that of any element."""


@dataclass
class Group:
    """One ranking over all tensors together, or over one of them; `order` finds its threshold."""

    tensors: frozenset[str]
    total: int
    order: OrderStatistic
    equal: dict[str, array[int]] = field(default_factory=dict)
    """Per tensor, for count 'exact': the first element of each window, followed by how many are at the threshold."""
    needed: int = 0
    """How many of them are to be kept in `window`."""
    window: tuple[str, int] | None = None
    """Tensor and first element of the window that has the last one to be kept."""
    cut: int = -1
    """The flat index of the last one to be kept, once it is found."""

    @property
    def divided(self) -> bool:
        """Whether some of the elements at the threshold are kept, and others are not."""
        return 0 < self.order.rank - self.order.above < self.order.equal

    def locate(self) -> None:
        """Find the window of the last one to be kept, from how many each window has."""
        self.needed = self.order.rank - self.order.above
        for tensor in sorted(self.equal):
            equal = self.equal[tensor]
            for start, here in sorted(zip(equal[::2], equal[1::2], strict=True)):
                if self.needed <= here:
                    self.window = tensor, start
                    self.equal.clear()
                    return
                self.needed -= here


@dataclass
class ThresholdState:
    """What is still looked for, and in which groups. others: the other groups, pickled because no span needs them.

    There are up to three readings: 'bin' counts what lies in a group's bin, 'equal' how many elements of each window
    are exactly at its threshold, 'cut' looks into the window of the last element that is kept.
    """

    wanted: Literal["bin", "equal", "cut"]
    groups: list[Group]
    others: bytes

    def every(self) -> list[Group]:
        """Return all groups, in the order of their tensors."""
        return sorted([*self.groups, *pickle.loads(self.others)], key=lambda group: min(group.tensors))

    def group_of(self, tensor: str) -> Group | None:
        """Return the group of a tensor, where something of it is looked for."""
        return self._by_tensor.get(tensor)

    @cached_property
    def _by_tensor(self) -> dict[str, Group]:
        return {tensor: group for group in self.groups for tensor in group.tensors}


class Threshold(Statistic):
    """The r-th largest |τ| of one expert, r = ⌊density · d⌋, d = elements of the selection (or of each tensor).

    count 'at_least' and 'published' keep |τ| ≥ threshold (published: r = int(d·density) + 1, as the authors' code
    does); 'exact' keeps exactly r: of those at the threshold the first by (tensor name, flat index). numbers: 'kept',
    'of', 'density' = kept/of, and per group the bit pattern of the threshold, how many are above and at it, the cut.
    """

    name: ClassVar[str] = "threshold"
    scope: ClassVar[Scope] = Scope.EXPERT
    looks: ClassVar[frozenset[type[Look]]] = frozenset({Counts, Sums, Blocks})
    largest_block: ClassVar[int] = WINDOW

    density: Shares
    ranked: Literal["global", "tensor"] = "global"
    count: Count = "at_least"
    least: Annotated[int, Field(ge=0)] = 0
    """At least so many elements of each ranking are wanted, where the density is above 0."""
    drop: RandomDrop | None = None

    def reported(self, numbers: Mapping[str, Any]) -> Mapping[str, float]:
        """Return the share of the task vector that the threshold really keeps."""
        return {"kept_density": float(numbers["density"])}

    def of_expert(self, position: int) -> Threshold:
        """Return the threshold with the expert's own density and rate."""
        if not isinstance(self.density, tuple) and (self.drop is None or self.drop.of_expert(position) is self.drop):
            return self
        density = self.density[position] if isinstance(self.density, tuple) else self.density
        return self.model_copy(update={"density": density, "drop": self.drop and self.drop.of_expert(position)})

    def statistics(self) -> dict[str, Statistic]:
        """Return the profile of the same delta; nothing where everything is kept."""
        return {} if self.keeps_all else {"profile": Profile(drop=self.drop), **drop_statistics(self.drop)}

    @property
    def keeps_all(self) -> bool:
        """Whether no expert's changes are trimmed."""
        return self.density == 1 or (isinstance(self.density, tuple) and all(share == 1 for share in self.density))

    def rank(self, total: int) -> int:
        """Return how many of `total` elements are wanted."""
        assert not isinstance(self.density, tuple)
        if self.count == "published":
            return min(int(total * self.density) + 1, total)
        wanted = floor(Fraction(str(self.density)) * total)
        return max(wanted, min(self.least, total)) if self.density > 0 else wanted

    def begin(self, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Rescan | Result:
        """Find each group's threshold from the profile, or its bin."""
        members = (
            [frozenset(selection)] if self.ranked == "global" else [frozenset([name]) for name in sorted(selection)]
        )
        groups = [self._group(tensors, sum(selection[name].count for name in tensors)) for tensors in members]
        counts = {} if self.keeps_all else fine_counts(statistics["profile"][0], selection)
        for group in groups if counts else ():
            if group.order.rank:
                group.order.locate_fine([counts[name] for name in group.tensors])
        return self._onward(groups, selection)

    def _onward(self, groups: Sequence[Group], selection: Mapping[str, TensorInfo]) -> Rescan | Result:
        """Return what to look for next, or the result."""
        wanted: Literal["bin", "equal", "cut"] = "bin"
        unfinished = [group for group in groups if group.order.left]
        if not unfinished and self.count == "exact":
            wanted, unfinished = "equal", [group for group in groups if group.divided and group.cut < 0]
            if any(group.equal for group in unfinished):
                wanted = "cut"
                for group in unfinished:
                    group.locate()
        if not unfinished:
            return Result({}, self._numbers(groups))
        parts = [(name, 0, selection[name].count) for group in unfinished for name in sorted(group.tensors)]
        if wanted == "cut":
            windows = [group.window for group in unfinished if group.window]
            parts = [(name, start, min(start + WINDOW, selection[name].count)) for name, start in windows]
        chosen = {id(group) for group in unfinished}
        others = pickle.dumps([group for group in groups if id(group) not in chosen], pickle.HIGHEST_PROTOCOL)
        return Rescan(ThresholdState(wanted, unfinished, others), tuple(parts))

    def _group(self, tensors: frozenset[str], total: int) -> Group:
        if self.keeps_all:  # whatever is at least 0
            return Group(tensors, total, OrderStatistic(total, above=total, value=0))
        return Group(tensors, total, OrderStatistic(self.rank(total)))

    def look(self, state: ThresholdState, block: Block, statistics: Statistics) -> Look | None:
        """Count inside the group's bin; once that is done, how many are at the threshold; then look for the cut."""
        group = state.group_of(block.name)
        if group is None:
            return None
        if state.wanted == "cut":
            return Blocks() if group.window == (block.name, block.start) else None
        drawn = drawn_for(self.drop, block, statistics)
        if state.wanted == "equal":
            return Sums(_equal, {"drawn": drawn, "value": group.order.value}, window=WINDOW)
        return Counts(magnitudes, {"drawn": drawn}, 1, ((group.order.bin,),))

    def counted(self, state: ThresholdState, tensor: str, counts: Sequence[SparseCounts]) -> ThresholdState:
        """Add the counts to the group's."""
        group = state.group_of(tensor)
        assert group is not None
        group.order.counted(counts[0])
        return state

    def summed(self, state: ThresholdState, tensor: str, start: int, sums: Sequence[float]) -> ThresholdState:
        """Note how many elements of a window are at the threshold."""
        group = state.group_of(tensor)
        assert group is not None
        group.equal.setdefault(tensor, array("q")).extend((start, int(sums[0])))
        return state

    def add(self, state: ThresholdState, block: Block, statistics: Statistics) -> ThresholdState:
        """Find the last element that is kept, for count 'exact'."""
        group = state.group_of(block.name)
        assert group is not None
        deltas = [delta.reshape(-1) for delta in block.experts]
        arguments = {"drawn": drawn_for(self.drop, block, statistics)}
        pattern = magnitudes(deltas, **materialised(arguments, block.start, deltas[0].numel(), deltas[0].device))[0]
        group.cut = block.start + int((pattern == group.order.value).nonzero()[group.needed - 1])
        return state

    def combine(self, left: ThresholdState, right: ThresholdState) -> ThresholdState:
        """Join what two workers have counted or found."""
        for ours, theirs in zip(left.groups, right.groups, strict=True):
            ours.order.join(theirs.order)
            for tensor, equal in theirs.equal.items():
                ours.equal.setdefault(tensor, array("q")).extend(equal)
            ours.cut = max(ours.cut, theirs.cut)
        return left

    def finish(
        self, state: ThresholdState, selection: Mapping[str, TensorInfo], statistics: Statistics
    ) -> Result | Rescan:
        """Return the thresholds, or what to look for next."""
        return self._onward(state.every(), selection)

    def _numbers(self, groups: Sequence[Group]) -> dict[str, Any]:
        orders = [group.order for group in groups]
        kept = [order.rank if self.count == "exact" else order.above + order.equal for order in orders]
        as_numbers = [
            {
                "bits": group.order.value,
                "above": group.order.above,
                "equal": group.order.equal,
                "cut": [group.window[0], group.cut] if group.window else None,
                "kept": here,
            }
            for group, here in zip(groups, kept, strict=True)
        ]
        of = sum(group.total for group in groups)
        names = None if self.ranked == "global" else [next(iter(group.tensors)) for group in groups]
        share = sum(kept) / of if of else 0.0
        return {"groups": as_numbers, "tensors": names, "kept": sum(kept), "of": of, "density": share}


def _equal(experts: Sequence[Tensor], drawn: Drawn | None, value: int) -> list[Tensor]:
    return [torch.where(pattern == value, 1.0, 0.0) for pattern in magnitudes(experts, drawn)]


def threshold_of(result: Found, tensor: str) -> tuple[float, int]:
    """Return (threshold, last) of a tensor: keep |τ| > threshold, and |τ| = threshold up to flat index `last`.

    result: that of a `Threshold`. The threshold is a float32 number, infinite where nothing is kept. last: ANY keeps
    all.
    """
    groups, names = result.numbers["groups"], result.numbers["tensors"]
    group = groups[0] if names is None else groups[names.index(tensor)]
    if group["bits"] < 0:
        return float("inf"), ANY
    value = value_of(group["bits"])
    if group["cut"] is None:
        return value, ANY
    name, index = group["cut"]
    return value, index if tensor == name else (ANY if tensor < name else -1)


def trim_statistics(threshold: Threshold) -> dict[str, Statistic]:
    """Return what `trims` needs: each expert's threshold, and the l1 factors of the drop where it has them."""
    return {"threshold": threshold, **drop_statistics(threshold.drop)}


@dataclass(frozen=True)
class Trims:
    """What `trimmed_deltas` needs for one block of T experts.

    least: per expert the smallest magnitude that is kept; None: all are. drawn: what its drop draws. last: per expert
    the flat index up to which elements exactly at the threshold are kept, and `index`, of each element; None: all are
    kept.
    """

    least: Sequence[float | None]
    drawn: Drawn | None
    last: Sequence[int] | None = None
    index: Tensor | None = None


def trims(threshold: Threshold, block: Block, statistics: Statistics) -> Trims:
    """Return what `trimmed_deltas` needs for a block."""
    cuts = [threshold_of(result, block.name) for result in statistics["threshold"]]
    least = [None if threshold.keeps_all else value for value, _ in cuts]
    drawn = drawn_for(threshold.drop, block, statistics)
    if threshold.count != "exact":
        return Trims(least, drawn)
    return Trims(least, drawn, [last for _, last in cuts], flat_index())


def trimmed_deltas(deltas: Sequence[Tensor], trims: Trims) -> list[Tensor]:
    """Return the deltas dropped and trimmed, τ̂_t."""
    ends: Sequence[int | None] = trims.last or [None] * len(deltas)
    return [
        trimmed(delta, least, last, trims.index)
        for delta, least, last in zip(dropped(deltas, trims.drawn), trims.least, ends, strict=True)
    ]
