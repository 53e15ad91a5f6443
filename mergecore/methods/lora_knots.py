"""KnOTS: adapters in the common basis of one SVD, and TIES there (Stoica et al. 2024, arXiv 2410.19735).

Checked against the authors' code (gstoica27/KnOTS, `SVDMerger` with `ties_masking` and `masked_merge`), number by
number on random adapters; the tests have its steps written anew on full matrices. Adapters with a scaling other than 1,
different ranks and modules that some adapters lack do not occur there; the rules for these are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import ROUNDING, decomposition
from mergecore.arithmetic.low_rank import dropped_at_random, nearest_adapter
from mergecore.arithmetic.pruned_adapter import PrunedAdapter
from mergecore.arithmetic.trims import RandomDrop, Shares, agreeing, disjoint_mean, elected_sign, folded_sum
from mergecore.checkpoints.adapters import LowRank, module_of, padded, relative_error
from mergecore.plugins.adapter_method import Combined, Updates, Walk
from mergecore.plugins.examples import Examples
from mergecore.plugins.per_expert import each
from mergecore.plugins.statistic import SparseCounts
from mergecore.statistics.radix import OrderStatistic, bits, joined, value_of


@dataclass(frozen=True)
class Aligned:
    """One module in the common basis: Δ_t = basis @ parts_t. basis: out × k. parts: k × in; None without the module."""

    basis: Tensor
    parts: Sequence[Tensor | None]


@dataclass
class Ranking:
    """The magnitudes of one expert, to find the least that stays. count: how many there are."""

    density: float
    count: int = 0
    high: SparseCounts | None = None
    order: OrderStatistic = field(default_factory=lambda: OrderStatistic(1))

    def count_high(self, pattern: Tensor) -> None:
        """Count the high half-words of magnitudes, in the first reading."""
        self.count += pattern.numel()
        self.high = joined(self.high, counted(pattern >> 16))

    def locate(self) -> None:
        """Find the bin of the least magnitude that stays: the authors keep everything from the k-th smallest on,
        k = n − ⌊density · n⌋."""
        self.order = OrderStatistic(int(self.density * self.count) + 1)
        if self.high is not None and self.order.rank <= self.count:
            self.order.locate([self.high])

    def count_low(self, pattern: Tensor) -> None:
        """Count the low half-words inside the bin, in the second reading."""
        self.order.counted(counted(pattern[pattern >> 16 == self.order.bin] & 0xFFFF))

    @property
    def least(self) -> float:
        """The least magnitude that stays."""
        return value_of(max(self.order.value, 0))


class LoraKnots(PrunedAdapter):
    """Write the experts' updates in the basis of one SVD of them all. Trim, elect and average there. The result is an
    adapter.
    """

    name: ClassVar[str] = "lora_knots"
    paper: ClassVar[str] = "Stoica et al. 2024, Model merging with SVD to tie the KnOTS, arXiv:2410.19735"
    published: ClassVar[tuple[str, ...]] = (
        "the authors' KnOTS-TIES; `scale` is their `scaling_coeffs`, `least: 1e-5` their cut of singular values",
        "with `density: 1` and a `drop` their KnOTS-DARE-TIES, of other random masks",
        "`scope: module` the KnOTS of Core Space's authors",
    )

    density: Annotated[
        Shares,
        Field(description="share of each expert's coordinates that is kept, the largest magnitudes, or one per expert"),
    ] = 0.2
    scale: Annotated[
        float, Field(description="λ, the factor of the result; the authors choose it on validation data")
    ] = 1.0
    scope: Annotated[
        Literal["global", "module"],
        Field(description="rank magnitudes over the whole adapter (the authors' code) or within each module"),
    ] = "global"
    elect: Annotated[
        Literal["mass", "none"],
        Field(description="'mass' joins the values that have the sign of their sum, 'none' all values"),
    ] = "mass"
    aggregate: Annotated[
        Literal["mean", "sum"], Field(description="'mean' divides by how many values are not 0; 'sum' does not divide")
    ] = "mean"
    side: Annotated[
        Literal["outputs", "inputs"],
        Field(description="the side on which the experts share a basis; the other one tells them apart"),
    ] = "outputs"
    least: Annotated[
        float | None,
        Field(ge=0, description="singular values up to this one are left out; none: those below rounding"),
    ] = None
    drop: Annotated[RandomDrop | None, Field(description="random drop of coordinates before the trim (DARE)")] = None
    rank: Annotated[
        int | None,
        Field(ge=1, description="rank of the result, cut by SVD; none: the experts' ranks together, nothing is lost"),
    ] = None

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[
                {},
                {"density": 0.5, "scope": "module", "side": "inputs", "rank": 3},
                {"density": 1, "drop": {"kind": "random", "rate": 0.4, "seed": 3}},
            ]
        )

    def rank_made(self, module: str, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return all ranks together, no more than the shared side has rows, or the rank of the cut."""
        whole = min(sum(ranks), shape[0] if self.side == "outputs" else shape[1])
        return whole if self.rank is None else min(self.rank, whole, *shape)

    def combined(self, module: str, updates: Updates) -> Combined:
        """Return one module, its magnitudes ranked by themselves."""
        ((_, whole),) = self._ranked(lambda: iter([(f"{module}.weight", updates)]))
        return whole

    def combined_all(self, walk: Walk) -> Iterator[tuple[str, Combined]]:
        if self.scope == "global":
            yield from self._ranked(walk)
        else:
            yield from super().combined_all(walk)

    def _ranked(self, walk: Walk) -> Iterator[tuple[str, Combined]]:
        rankings = self._rankings(walk)
        for target, updates in walk():
            yield target, self._joined(target, updates, [ranking.least for ranking in rankings])

    def _rankings(self, walk: Walk) -> list[Ranking]:
        """Return for every expert the ranking of its magnitudes over all modules, in at most two readings."""
        rankings: list[Ranking] = []
        for target, updates in walk():
            rankings = rankings or [Ranking(density) for density in each(self.density, len(updates))]
            if all(ranking.density >= 1 for ranking in rankings):
                return rankings  # nothing is cut
            for ranking, part in zip(rankings, self._aligned(target, updates).parts, strict=True):
                if part is not None:
                    ranking.count_high(pattern_of(part))
        for ranking in rankings:
            ranking.locate()
        for target, updates in walk():
            for ranking, part in zip(rankings, self._aligned(target, updates).parts, strict=True):
                if part is not None:
                    ranking.count_low(pattern_of(part))
        return rankings

    def _aligned(self, target: str, updates: Updates) -> Aligned:
        """Return U and the S Vᵀ_t of [Δ_1 … Δ_T] = U S [V_1 … V_T]ᵀ, without forming the Δ_t; then the drop."""
        present = [turned(update, self.side) for update in updates if update is not None]
        outer, tall = torch.linalg.qr(torch.cat([update.up for update in present], 1))
        inner = [torch.linalg.qr((update.down * update.scaling).mT)[1].mT for update in present]
        blocks = tall.split([update.rank for update in present], 1)
        small = torch.cat([block @ right for block, right in zip(blocks, inner, strict=True)], 1)
        rotated, values, _ = decomposition(small)
        cut = ROUNDING * float(small.norm()) if self.least is None else self.least
        basis = outer @ rotated[:, : int((values > cut).sum())]
        parts: list[Tensor | None] = []
        for place, update in enumerate(updates):
            if update is None:
                parts.append(None)
                continue
            own = turned(update, self.side)
            part = basis.mT @ own.up @ (own.down * own.scaling)
            parts.append(dropped_at_random(part, self.drop, place, own.owner, target))
        return Aligned(basis, parts)

    def _joined(self, target: str, updates: Updates, least: Sequence[float]) -> Combined:
        aligned = self._aligned(target, updates)
        trimmed = [
            torch.where(part.to(torch.float32).abs() >= cut, part, 0.0)
            for part, cut in zip(aligned.parts, least, strict=True)
            if part is not None
        ]
        kept = agreeing(trimmed, elected_sign(trimmed)) if self.elect == "mass" else trimmed
        merged = (disjoint_mean(kept) if self.aggregate == "mean" else folded_sum(kept)) * self.scale
        down, up = (merged, aligned.basis) if self.side == "outputs" else (aligned.basis.mT, merged.mT)
        present = [update for update in updates if update is not None]
        shape = (len(present[0].up), present[0].down.shape[1])
        rank = self.rank_made(module_of(target), [update.rank for update in present], shape)
        if self.rank is not None:
            return nearest_adapter(down, up, rank)
        return Combined(*padded(down, up, rank), {})

    def total(self, modules: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return the relative error of the cut, in the Frobenius norm."""
        return {} if self.rank is None else {"error": relative_error(modules)}


def turned(update: LowRank, side: Literal["outputs", "inputs"]) -> LowRank:
    """Return the update, or its transpose where the inputs are the shared side."""
    if side == "outputs":
        return update
    return LowRank(update.up.mT, update.down.mT, update.scaling, update.owner)


def pattern_of(part: Tensor) -> Tensor:
    """Return the patterns of a part's magnitudes, rounded to float32."""
    return bits(part.to(torch.float32).abs().reshape(-1))


def counted(numbers: Tensor) -> SparseCounts:
    """Return how often each number occurs."""
    values, counts = np.unique(numbers.numpy(), return_counts=True)
    return values.astype(np.int64), counts.astype(np.int64)
