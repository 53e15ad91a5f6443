"""The profile of a task vector: per tensor how many |τ| fall into each of 2^16 bins of the bit pattern.

The bit pattern of a non-negative float32 grows with its value. So the high half-word is a bin number, and one reading
tells the bin of any order statistic (specs §0.3, radix selection). Each bin is two bins here: its smallest value, and
all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergecore.arithmetic.trims import Drawn, RandomDrop, dropped
from mergecore.plugins.block import Block
from mergecore.plugins.statistic import Counts, Found, Look, Result, Scope, SparseCounts, Statistic, Statistics
from mergecore.statistics.dropped_norms import drawn_for, drop_statistics
from mergecore.statistics.radix import bits, fine, joined
from mergecore.tensors.source import TensorInfo

State = dict[str, SparseCounts]
"""Counts per tensor."""


class Profile(Statistic):
    """Bit-pattern counts of one expert's delta, over all tensors that it carries (of any selection)."""

    name: ClassVar[str] = "profile"
    shown_as: ClassVar[str] = "task vector"
    version: ClassVar[int] = 3
    scope: ClassVar[Scope] = Scope.EXPERT
    looks: ClassVar[frozenset[type[Look]]] = frozenset({Counts})
    whole: ClassVar[bool] = True

    drop: RandomDrop | None = None

    def statistics(self) -> dict[str, Statistic]:
        """Return the l1 factors of the drop, where it has them."""
        return drop_statistics(self.drop)

    def begin(self, selection: Mapping[str, TensorInfo], statistics: Statistics) -> State:
        """Return the state without counts."""
        return {}

    def look(self, state: State, block: Block, statistics: Statistics) -> Counts:
        """Count the finer bin of every magnitude."""
        return Counts(_fine, {"drawn": drawn_for(self.drop, block, statistics)})

    def counted(self, state: State, tensor: str, counts: Sequence[SparseCounts]) -> State:
        """Add the counts."""
        state[tensor] = joined(state.get(tensor), counts[0])
        return state

    def combine(self, left: State, right: State) -> State:
        """Add the counts of both."""
        for name, counts in right.items():
            left[name] = joined(left.get(name), counts)
        return left

    def finish(self, state: State, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Result:
        """Return bins, counts, and offset (tensors + 1), all int64; and the numbers {'tensors': their names}."""
        names = sorted(state)
        sizes = [len(state[name][0]) for name in names]
        tensors = {
            "bins": _concatenated([state[name][0] for name in names]) + (1 << 15),
            "counts": _concatenated([state[name][1] for name in names]),
            "offset": torch.tensor([0, *np.cumsum(sizes).tolist()], dtype=torch.int64),
        }
        return Result(tensors, {"tensors": names})


def magnitudes(experts: Sequence[Tensor], drawn: Drawn | None) -> list[Tensor]:
    """Return the bit patterns of |τ|, after the drop."""
    return [bits(delta.abs()) for delta in dropped(experts, drawn)]


def _fine(experts: Sequence[Tensor], drawn: Drawn | None) -> list[Tensor]:
    return [fine(delta.abs()) for delta in dropped(experts, drawn)]


def _concatenated(parts: list[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.int64)


def fine_counts(profile: Found, selection: Mapping[str, TensorInfo]) -> dict[str, SparseCounts]:
    """Return the counts of the finer bins for each tensor of the selection.

    What was not counted is 0: tensors that the expert does not carry, and values beside one that is not finite, which
    the merge itself will refuse.
    """
    names = list(profile.numbers["tensors"])
    bins, all_counts, offset = (profile.tensors.read(name).numpy() for name in ("bins", "counts", "offset"))
    numbers = {name: number for number, name in enumerate(names)}
    by_tensor: dict[str, SparseCounts] = {}
    for name, info in selection.items():
        counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        if name in numbers:
            start, stop = offset[numbers[name]], offset[numbers[name] + 1]
            counts = bins[start:stop], all_counts[start:stop]
        rest = info.count - int(counts[1].sum())
        by_tensor[name] = joined(counts, (np.zeros(1, dtype=np.int64), np.array([rest]))) if rest else counts
    return by_tensor
