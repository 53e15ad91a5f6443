"""The exact magnitude threshold of a task vector at a density, without sorting: radix selection in two scans.

TIES (Yadav et al. 2023, §3.1 trim). The profile is the first scan; where it does not tell the value a second counts the
low half-words inside the bin that holds the wanted rank, which gives the r-th largest |τ| to the last bit and how many
are above and at it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import floor
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mergecore.identity import GRID
from mergecore.kernels.run import materialised
from mergecore.method import (
    Block,
    Counting,
    Found,
    Index,
    Rescan,
    Result,
    Scope,
    Sparse,
    Statistic,
    Statistics,
    TensorInfo,
)
from mergecore.statistics.dropped_norms import drawn_for, drop_statistics
from mergecore.statistics.profile import Profile, fine_counts, magnitudes
from mergecore.statistics.radix import OrderStatistic, coarse, value_of
from mergecore.trims import RandomDrop, Shares, dropped, trimmed

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
    block: tuple[str, int] | None = None
    """Tensor and first element of the block in which the last of them lies that is kept; None where all of them are."""
    cut: int = -1
    """Its flat index, once it is found."""

    def holds_cut(self, block: Block) -> bool:
        """Whether the last one may lie in this part of a tensor."""
        if self.block is None or block.name != self.block[0]:
            return False
        return block.start < self.block[1] + GRID and self.block[1] < block.stop


@dataclass
class ThresholdState:
    """The groups that are not found yet, and the others, pickled: every span is sent the state, and needs the first alone.
    Once a group has a block, the last elements that are kept are being looked for."""

    groups: list[Group]
    found: bytes

    @classmethod
    def of(cls, groups: Sequence[Group], unfound: Callable[[Group], bool]) -> ThresholdState:
        """The state of all groups."""
        rest = [group for group in groups if not unfound(group)]
        return cls([group for group in groups if unfound(group)], pickle.dumps(rest, pickle.HIGHEST_PROTOCOL))

    def every(self) -> list[Group]:
        """All groups, in the order of their tensors."""
        return sorted([*self.groups, *pickle.loads(self.found)], key=lambda group: min(group.tensors))

    def group_of(self, tensor: str) -> Group | None:
        """The group that ranks this tensor, where it is not found yet."""
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
        """The profile of the same delta; nothing where everything is kept."""
        return {} if self.keeps_all else {"profile": Profile(drop=self.drop), **drop_statistics(self.drop)}

    @property
    def keeps_all(self) -> bool:
        """Whether no expert's changes are trimmed."""
        return self.density == 1 or (isinstance(self.density, tuple) and all(share == 1 for share in self.density))

    def rank(self, total: int) -> int:
        """How many of `total` elements are wanted."""
        assert not isinstance(self.density, tuple)
        if self.count == "published":
            return min(int(total * self.density) + 1, total)
        wanted = floor(Fraction(str(self.density)) * total)
        return max(wanted, min(self.least, total)) if self.density > 0 else wanted

    def begin(self, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Rescan | Result:
        """Find each group's threshold from the profile, or its bin; for count exact its bin alone, to count by blocks."""
        members = (
            [frozenset(selection)] if self.ranked == "global" else [frozenset([name]) for name in sorted(selection)]
        )
        groups = [self._group(tensors, sum(selection[name].count for name in tensors)) for tensors in members]
        counts = {} if self.keeps_all else fine_counts(statistics["profile"][0], selection)
        for group in groups if counts else ():
            held = [counts[name] for name in group.tensors]
            if group.order.rank and self.count == "exact":
                group.order.locate(coarse(part) for part in held)
            elif group.order.rank:
                group.order.locate_fine(held)
        unsettled = sorted(name for group in groups if group.order.left for name in group.tensors)
        blocks = [(name, start) for name in unsettled for start in range(0, selection[name].count, GRID)]
        if not blocks:
            return Result({}, self._numbers(groups))
        return Rescan(ThresholdState.of(groups, lambda group: bool(group.order.left)), tuple(blocks))

    def _group(self, tensors: frozenset[str], total: int) -> Group:
        if self.keeps_all:  # whatever is at least 0
            return Group(tensors, total, OrderStatistic(total, above=total, value=0))
        return Group(tensors, total, OrderStatistic(self.rank(total)))

    def counting(self, state: ThresholdState, block: Block, statistics: Statistics) -> Counting | None:
        """In the first scan the low half-words inside the bin; then it looks into the blocks that hold a cut."""
        group = state.group_of(block.name)
        if group is not None and group.cut < 0 and group.holds_cut(block):
            return None
        windows = ((group.order.bin,),) if group is not None and group.order.left else ()
        arguments = {"drawn": drawn_for(self.drop, block, statistics)}
        return Counting(magnitudes, arguments, 1, windows, by_block=self.count == "exact")

    def counted(self, state: ThresholdState, tensor: str, start: int, counts: Sequence[Sparse]) -> ThresholdState:
        """The group's counts; by block only where the one that holds the cut will be looked for."""
        group = state.group_of(tensor)
        assert group is not None
        group.order.counted((tensor, start) if self.count == "exact" else ("", 0), counts[0])
        return state

    def add(self, state: ThresholdState, block: Block, statistics: Statistics) -> ThresholdState:
        """For count exact: where in its block, which comes in parts from the first on, the last one kept lies."""
        group = state.group_of(block.name)
        assert group is not None
        deltas = [delta.reshape(-1) for delta in block.experts]
        arguments = {"drawn": drawn_for(self.drop, block, statistics)}
        pattern = magnitudes(deltas, **materialised(arguments, block.start, deltas[0].numel(), deltas[0].device))[0]
        equal = pattern == group.order.value
        here = int(equal.sum())
        if group.needed <= here:
            group.cut = block.start + int(equal.nonzero()[group.needed - 1])
        group.needed -= here
        return state

    def combine(self, left: ThresholdState, right: ThresholdState) -> ThresholdState:
        """Join what two workers counted or found."""
        for ours, theirs in zip(left.groups, right.groups, strict=True):
            ours.order.join(theirs.order)
            ours.cut = max(ours.cut, theirs.cut)
        return left

    def finish(
        self, state: ThresholdState, selection: Mapping[str, TensorInfo], statistics: Statistics
    ) -> Result | Rescan:
        """The thresholds; for count exact first a look into the blocks in which a cut lies."""
        if self.count == "exact" and not any(group.block for group in state.groups):
            for group in state.groups:
                _descend(group)
            blocks = sorted(group.block for group in state.groups if group.block)
            if blocks:
                return Rescan(ThresholdState.of(state.every(), lambda group: bool(group.block)), tuple(blocks))
        return Result({}, self._numbers(state.every()))

    def _numbers(self, held: Sequence[Group]) -> dict[str, Any]:
        orders = [group.order for group in held]
        kept = [order.rank if self.count == "exact" else order.above + order.equal() for order in orders]
        groups = [
            {
                "bits": group.order.value,
                "above": group.order.above,
                "equal": group.order.equal(),
                "cut": [group.block[0], group.cut] if group.block else None,
                "kept": here,
            }
            for group, here in zip(held, kept, strict=True)
        ]
        of = sum(group.total for group in held)
        names = None if self.ranked == "global" else [next(iter(group.tensors)) for group in held]
        share = sum(kept) / of if of else 0.0
        return {"groups": groups, "tensors": names, "kept": sum(kept), "of": of, "density": share}


def _descend(group: Group) -> None:
    """Where some of those at the threshold go: find the block in which the last one kept lies, from how many each has."""
    order = group.order
    group.needed = order.rank - order.above
    if not order.rank or group.needed == order.equal():
        return
    for block in sorted(order.low):
        here = int(order.low[block][1].sum())
        if group.needed <= here:
            group.block = block
            return
        group.needed -= here


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


def trim_statistics(threshold: Threshold) -> dict[str, Statistic]:
    """What `trims` is worked out from: each expert's threshold, and the l1 factors of the drop where it has them."""
    return {"threshold": threshold, **drop_statistics(threshold.drop)}


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
