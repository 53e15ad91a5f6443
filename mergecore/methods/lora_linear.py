"""Weighted sums of LoRA factors or updates, pruned by magnitude or at random before: PEFT's `add_weighted_adapter`.

Checked against PEFT 0.21 itself, number by number: `linear`, `magnitude_prune`, `dare_linear`, and the `_svd` forms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from mergecore.arithmetic.low_rank import (
    Of,
    Parts,
    check_rank,
    joined_parts,
    rank_of_parts,
)
from mergecore.arithmetic.pruned_adapter import PrunedAdapter
from mergecore.arithmetic.trims import RandomDrop, Shares, folded_sum
from mergecore.arithmetic.weights import weighted
from mergecore.checkpoints.adapters import relative_error
from mergecore.plugins.adapter_method import Combined, Updates
from mergecore.plugins.examples import Examples
from mergecore.plugins.per_expert import each


class LoraLinear(PrunedAdapter):
    """Make an adapter from the weighted sum of the experts' factors, or of their updates. They may be pruned first."""

    name: ClassVar[str] = "lora_linear"
    per_expert: ClassVar[tuple[str, ...]] = ("weights", "density")
    paper: ClassVar[str] = (
        "Yu et al. 2024, Language models are Super Mario: absorbing abilities from homologous models as a free lunch, "
        "arXiv:2311.03099 (the random drop); the rest as PEFT does it"
    )
    published: ClassVar[tuple[str, ...]] = (
        "PEFT's `linear`; with `density` its `magnitude_prune`",
        "with `drop: {kind: random, rate: 1 − density}` its `dare_linear`, of other random masks",
        "with `of: update` its `svd`, `magnitude_prune_svd` and `dare_linear_svd`",
    )

    weights: Annotated[
        tuple[float, ...] | None,
        Field(description="one per expert, negative ones forget; none: 1 each"),
    ] = None
    scale: Annotated[float, Field(description="λ, the factor of the result")] = 1.0
    of: Of = "factors"
    density: Annotated[
        Shares, Field(description="share of each factor's or update's elements that is kept, the largest magnitudes")
    ] = 1.0
    drop: Annotated[RandomDrop | None, Field(description="random drop before magnitudes are compared (DARE)")] = None
    rank: Annotated[
        int | None, Field(ge=1, description="of the result with `of: update`; none: the largest of the experts' ranks")
    ] = None

    @classmethod
    def examples(cls) -> Examples:
        drop = {"kind": "random", "rate": 0.4, "seed": 3}
        return Examples(
            golden=[
                {"of": "update"},
                {"of": "update", "density": 0.5, "weights": [0.5, 1, -2], "rank": 3},
                {"of": "update", "drop": drop},
            ]
        )

    def validate_count(self, count: int) -> None:
        check_rank(self.name, self.of, self.rank)
        super().validate_count(count)

    def rank_made(self, module: str, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return the experts' rank, or the rank of the cut. Raise SpecError for factors of different ranks."""
        return rank_of_parts(self.name, self.of, self.rank, module, ranks, shape)

    def combined(self, module: str, updates: Updates) -> Combined:
        """Return Σ w_t s_t B_t A_t cut to the rank; of factors Σ √(w_t s_t) B_t and Σ √(w_t s_t) A_t."""
        weights, shares = (each(values, len(updates)) for values in (self.weights or 1.0, self.density))
        parts = Parts(self.of, weights, shares, self.drop, self.rank, self.scale)
        return joined_parts(module, updates, parts, lambda values, factors: folded_sum(weighted(values, factors)))

    def total(self, modules: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return the relative error of the cut, in the Frobenius norm."""
        return {"error": relative_error(modules)} if self.of == "update" else {}
