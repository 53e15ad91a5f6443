"""The profile of a task vector: per tensor its norms and how many |τ| fall into each of 2^15 bins of the bit pattern.

The bit pattern of a non-negative float32 grows with its value, so the high half-word is a bin number and one scan is
enough to know in which bin any order statistic lies (specs §0.3, radix selection).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergecore.method import Block, Found, Result, Scope, Statistic, Statistics, TensorInfo
from mergecore.statistics.dropped_norms import drop_statistics, l1_factors
from mergecore.statistics.radix import HIGH, Sparse, bits, joined, sparse
from mergecore.trims import RandomDrop, dropped


@dataclass
class ProfileState:
    """Counts per tensor, and one row of float64 sums per block."""

    counts: dict[str, Sparse] = field(default_factory=dict)
    blocks: list[tuple[str, int, float, float, float, int]] = field(default_factory=list)


class Profile(Statistic):
    """Norms and bit-pattern counts of one expert's delta, over all tensors that it carries (of any selection)."""

    name: ClassVar[str] = "profile"
    scope: ClassVar[Scope] = Scope.EXPERT
    whole: ClassVar[bool] = True

    drop: RandomDrop | None = None

    def statistics(self) -> dict[str, Statistic]:
        """The l1 factors of the drop, where it has them."""
        return drop_statistics(self.drop)

    def begin(self, selection: Mapping[str, TensorInfo], statistics: Statistics) -> ProfileState:
        """Nothing counted."""
        return ProfileState()

    def add(self, state: ProfileState, block: Block, statistics: Statistics) -> ProfileState:
        """Count one block."""
        delta = dropped(self.drop, block, l1_factors(self.drop, statistics, block.name))[0]
        magnitude = delta.abs()
        counts = sparse(bits(magnitude) >> 16, HIGH)
        state.counts[block.name] = joined(state.counts.get(block.name), counts)
        wide = magnitude.to(torch.float64)
        state.blocks.append(
            (
                block.name,
                block.start,
                float(wide.sum()),
                float((wide * wide).sum()),
                float(magnitude.max()),
                int(torch.count_nonzero(magnitude)),
            )
        )
        return state

    def combine(self, left: ProfileState, right: ProfileState) -> ProfileState:
        """Counts added, blocks side by side."""
        for name, counts in right.counts.items():
            left.counts[name] = joined(left.counts.get(name), counts)
        left.blocks.extend(right.blocks)
        return left

    def finish(self, state: ProfileState, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Result:
        """bins, counts (int64), offset (int64, tensors+1), norms (float64, tensors × [l1, l2², max, non-zero])."""
        names = sorted(state.counts)
        norms = {name: [0.0, 0.0, 0.0, 0.0] for name in names}
        for name, _, absolute, squared, largest, nonzero in sorted(state.blocks):
            row = norms[name]
            norms[name] = [row[0] + absolute, row[1] + squared, max(row[2], largest), row[3] + nonzero]
        sizes = [len(state.counts[name][0]) for name in names]
        tensors = {
            "bins": _concatenated([state.counts[name][0] for name in names]),
            "counts": _concatenated([state.counts[name][1] for name in names]),
            "offset": torch.tensor([0, *np.cumsum(sizes).tolist()], dtype=torch.int64),
            "norms": torch.tensor([norms[name] for name in names], dtype=torch.float64).reshape(-1, 4),
        }
        rows = tensors["norms"]
        numbers = {
            "tensors": names,
            "l1": float(rows[:, 0].sum()),
            "l2": float(rows[:, 1].sum() ** 0.5),
            "max": float(rows[:, 2].max()) if names else 0.0,
            "non_zero": int(rows[:, 3].sum()),
        }
        return Result(tensors, numbers)


def _concatenated(parts: list[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.int64)


def high_counts(profile: Found, selection: Mapping[str, TensorInfo]) -> dict[str, Sparse]:
    """Per tensor of the selection the counts of the profile; a tensor the expert does not carry is all zeros."""
    names = list(profile.numbers["tensors"])
    held = {name: profile.tensors.read(name).numpy() for name in ("bins", "counts", "offset")}
    place = {name: position for position, name in enumerate(names)}
    found: dict[str, Sparse] = {}
    for name, info in selection.items():
        if name in place:
            start, stop = held["offset"][place[name]], held["offset"][place[name] + 1]
            found[name] = held["bins"][start:stop], held["counts"][start:stop]
        else:
            found[name] = np.zeros(1, dtype=np.int64), np.array([info.count], dtype=np.int64)
    return found
