"""What turns e^x into a softmax over a whole model: Σ_p e^(Norm(τ_i ⊙ τ_j)_p) / d per pair (PCB-Merging 2024, §3.2).

Norm is min–max over all coordinates: a first reading finds the smallest and largest product of every pair, a second one
forms the means, in float64 over the fixed grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from mergecore.arithmetic.transcendental import exponential
from mergecore.arithmetic.trims import divided
from mergecore.plugins.block import Block
from mergecore.plugins.statistic import Blocks, Look, Rescan, Result, Scope, Statistic, Statistics
from mergecore.statistics.block_sums import folded
from mergecore.tensors.source import TensorInfo

PIECE = 1 << 16
"""Elements that are worked on at once, to stay in the processor's cache; sums are per grid block."""


@dataclass
class SoftmaxState:
    """extremes: of τ_i ⊙ τ_j, per pair i ≤ j.

    sums: once `ready`, of e^Norm, per grid block, of pairs and of experts.
    """

    extremes: list[tuple[float, float]]
    ready: bool = False
    sums: list[tuple[str, int, list[float]]] = field(default_factory=list)


class SoftmaxMeans(Statistic):
    """'low', 'high': extremes of τ_i ⊙ τ_j; 'inter': mean of e^Norm; for pairs in the order of `pairs`.

    'intra': per expert the mean of e^(T·Norm(τ_i ⊙ τ_i) − T), T the number of experts.
    """

    name: ClassVar[str] = "softmax_means"
    scope: ClassVar[Scope] = Scope.POOL
    looks: ClassVar[frozenset[type[Look]]] = frozenset({Blocks})

    @property
    def readings(self) -> int:
        """Two: extremes, then means."""
        return 2

    def begin(self, selection: Mapping[str, TensorInfo], statistics: Statistics) -> SoftmaxState:
        """Return the state before any block."""
        return SoftmaxState([])

    def look(self, state: SoftmaxState, block: Block, statistics: Statistics) -> Blocks:
        """Ask for the blocks: the sums are in the order of `_sum`, which the engine does not have."""
        return Blocks()

    def add(self, state: SoftmaxState, block: Block, statistics: Statistics) -> SoftmaxState:
        """Widen the extremes in the first reading; add the sums of the block in the second."""
        deltas = [delta.reshape(-1) for delta in block.experts]
        if not state.ready:
            extremes = [_extremes(deltas[i] * deltas[j]) for i, j in pairs(len(deltas))]
            state.extremes = _wider(state.extremes, extremes)
            return state
        count = len(deltas)
        sums = [0.0] * (len(state.extremes) + count)
        for start in range(0, deltas[0].numel(), PIECE):
            parts = [delta[start : start + PIECE] for delta in deltas]
            for position, (i, j) in enumerate(pairs(count)):
                share = normalized(parts[i] * parts[j], scaling(*state.extremes[position]))
                sums[position] += _sum(exponential(share))
                if i == j:
                    sums[len(state.extremes) + i] += _sum(exponential(share * count - count))
        state.sums.append((block.name, block.start, sums))
        return state

    def combine(self, left: SoftmaxState, right: SoftmaxState) -> SoftmaxState:
        """Take the wider extremes and the sums of both."""
        left.extremes = _wider(left.extremes, right.extremes)
        left.sums.extend(right.sums)
        return left

    def finish(
        self, state: SoftmaxState, selection: Mapping[str, TensorInfo], statistics: Statistics
    ) -> Result | Rescan:
        """Return the wish to read again after the first reading, then the means."""
        if not state.ready and state.extremes:
            return Rescan(SoftmaxState(state.extremes, ready=True))
        total = sum(info.count for info in selection.values())
        sums = folded(state.sums, lambda name: "").get("", [])
        means, split = [value / total for value in sums], len(state.extremes)
        low, high = [low for low, _ in state.extremes], [high for _, high in state.extremes]
        return Result({}, {"low": low, "high": high, "inter": means[:split], "intra": means[split:]})


def pairs(count: int) -> list[tuple[int, int]]:
    """Return (0,0), (0,1) … (0,T−1), (1,1) …: every pair once, the partners of each expert in ascending order."""
    return [(i, j) for i in range(count) for j in range(i, count)]


@dataclass(frozen=True)
class Scaling:
    """What `normalized` subtracts and divides by; width None: every value becomes `low`."""

    low: float
    width: float | None


def scaling(low: float, high: float) -> Scaling:
    """Return what `normalized` needs; where all values are equal they count as 1, or as 0 where they are 0."""
    return Scaling(low, high - low) if high > low else Scaling(1.0 if high != 0 else 0.0, None)


def normalized(values: Tensor, scaling: Scaling) -> Tensor:
    """Return the values scaled to 0 … 1: (x − low) / (high − low)."""
    if scaling.width is None:
        return values * 0.0 + scaling.low
    return divided(values - scaling.low, scaling.width)


def _extremes(values: Tensor) -> tuple[float, float]:
    return (float(values.min()), float(values.max())) if values.numel() else (inf, -inf)


def _sum(values: Tensor) -> float:
    """Return the sum in float64, halves added to halves: no library can choose another order."""
    wide = values.double()
    while wide.numel() > 1:
        half = wide.numel() // 2
        odd = wide[2 * half :]
        wide = torch.cat([wide[:half] + wide[half : 2 * half], odd]) if odd.numel() else wide[:half] + wide[half:]
    return float(wide)


def _wider(left: Sequence[tuple[float, float]], right: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    if not left or not right:
        return list(left or right)
    return [(min(a, c), max(b, d)) for (a, b), (c, d) in zip(left, right, strict=True)]
