"""Sums of LoRA adapters, exact: their ranks side by side, or the nearest adapter of a chosen rank (Hu et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from mergecore.arithmetic.low_rank import nearest_adapter
from mergecore.arithmetic.weights import divisor
from mergecore.checkpoints.adapters import LowRank, relative_error
from mergecore.errors import SpecError
from mergecore.plugins.adapter_method import AdapterMethod, Combined
from mergecore.plugins.examples import Examples
from mergecore.plugins.per_expert import check_weights, moved


class LoraArithmetic(AdapterMethod):
    """Make an adapter whose update is the weighted sum of the experts' updates. Ranks add up, or an SVD cuts them."""

    name: ClassVar[str] = "lora_arithmetic"
    paper: ClassVar[str] = "Hu et al. 2022, LoRA: low-rank adaptation of large language models, arXiv:2106.09685"

    weights: Annotated[
        tuple[float, ...] | None, Field(description=("one factor per expert, in the order of the recipe; none: 1 each"))
    ] = None
    aggregate: Annotated[
        Literal["sum", "mean"],
        Field(
            description="'mean' divides by the magnitudes of all weights together, also for a module that some experts "
            "do not have"
        ),
    ] = "sum"
    scale: Annotated[float, Field(description="λ, the factor of the result; negative forgets")] = 1.0
    rank: Annotated[
        int | None,
        Field(
            ge=1,
            description=(
                "rank of the result, which is then the nearest in the Frobenius norm; none: all ranks, "
                "and nothing is lost"
            ),
        ),
    ] = None

    @classmethod
    def examples(cls) -> Examples:
        return Examples(golden=[{}, {"weights": [0.5, 1, -2], "rank": 3}])

    def revision(self, count: int) -> int:
        return self.version + (self.aggregate == "mean" and min(self.weights or (1.0,)) < 0)

    def validate_count(self, count: int) -> None:
        if self.aggregate == "mean":
            check_weights(self.weights, count)
        elif self.weights is not None and len(self.weights) != count:
            raise SpecError(f"weights: {len(self.weights)} given for {count} experts; give one per expert, or none")

    def bound(self, order: Sequence[int]) -> LoraArithmetic:
        return self if self.weights is None else self.model_copy(update={"weights": moved(self.weights, order)})

    def rank_made(self, module: str, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return all ranks together, or at most the rank asked for; a matrix has no more than min(out, in)."""
        return sum(ranks) if self.rank is None else min(self.rank, sum(ranks), *shape)

    def combined(self, module: str, updates: Sequence[LowRank | None]) -> Combined:
        """Return [down_1; down_2; …] and [c_1 up_1, c_2 up_2, …]: their product is Σ c_i ΔW_i."""
        weights = self.weights or (1.0,) * len(updates)
        whole = self.scale / (divisor(weights, len(weights), "mean") if self.aggregate == "mean" else 1.0)
        present = [(update, weight) for update, weight in zip(updates, weights, strict=True) if update is not None]
        down = torch.cat([update.down for update, _ in present])
        up = torch.cat([update.up * (update.scaling * weight * whole) for update, weight in present], 1)
        if self.rank is None:
            return Combined(down, up, {})
        shape = (up.shape[0], down.shape[1])
        return nearest_adapter(down, up, self.rank_made(module, [update.rank for update, _ in present], shape))

    def total(self, modules: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return the relative error of the cut: what was lost of the sum, in the Frobenius norm."""
        return {} if self.rank is None else {"error": relative_error(modules)}
