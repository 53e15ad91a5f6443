"""TIES-Merging of LoRA factors or updates, as PEFT's `add_weighted_adapter` does it (Yadav et al. 2023, §3).

Checked against PEFT 0.21 itself, number by number: `ties`, `dare_ties`, and the `_svd` forms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.low_rank import (
    Majority,
    Of,
    Parts,
    check_rank,
    joined_parts,
    majority_signs,
    mean_of_agreeing,
    rank_of_parts,
)
from mergecore.arithmetic.pruned_adapter import PrunedAdapter
from mergecore.arithmetic.trims import RandomDrop, Shares
from mergecore.checkpoints.adapters import relative_error
from mergecore.plugins.adapter_method import Combined, Updates
from mergecore.plugins.examples import Examples
from mergecore.plugins.per_expert import each


class LoraTies(PrunedAdapter):
    """Trim the experts' factors or updates, elect signs, and average what has the elected sign. The result is an
    adapter.
    """

    name: ClassVar[str] = "lora_ties"
    per_expert: ClassVar[tuple[str, ...]] = ("weights", "density")
    paper: ClassVar[str] = (
        "Yadav et al. 2023, TIES-Merging: resolving interference when merging models, arXiv:2306.01708"
    )
    published: ClassVar[tuple[str, ...]] = (
        "PEFT's `ties`, with `majority` as its `majority_sign_method`",
        "with `density: 1` and `drop: {kind: random, rate: 1 − density}` its `dare_ties`, of other random masks",
        "with `of: update` its `ties_svd` and `dare_ties_svd`",
    )

    weights: Annotated[
        tuple[float, ...] | None,
        Field(
            description="one per expert, for the values that agree; their mean divides by how many agree, not by "
            "weights; none: 1 each"
        ),
    ] = None
    scale: Annotated[float, Field(description="λ, the factor of the result")] = 1.0
    of: Of = "factors"
    density: Annotated[
        Shares, Field(description="share of each factor's or update's elements that is kept, the largest magnitudes")
    ] = 0.2
    majority: Annotated[
        Majority,
        Field(
            description="the sign that is elected where trimmed values differ: of their sum ('total'), or the one that "
            "more experts have ('frequency'); positive where these cancel, and weights have no part in it"
        ),
    ] = "total"
    drop: Annotated[RandomDrop | None, Field(description="random drop before the trim (DARE-TIES)")] = None
    rank: Annotated[
        int | None, Field(ge=1, description="of the result with `of: update`; none: the largest of the experts' ranks")
    ] = None

    @classmethod
    def examples(cls) -> Examples:
        drop = {"kind": "random", "rate": 0.4, "seed": 3}
        return Examples(
            golden=[
                {"of": "update"},
                {"of": "update", "density": 0.5, "weights": [0.5, 1, -2], "rank": 3, "majority": "frequency"},
                {"of": "update", "density": 1, "drop": drop},
            ]
        )

    def validate_count(self, count: int) -> None:
        check_rank(self.name, self.of, self.rank)
        super().validate_count(count)

    def rank_made(self, module: str, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return the experts' rank, or the rank of the cut. Raise SpecError for factors of different ranks."""
        return rank_of_parts(self.name, self.of, self.rank, module, ranks, shape)

    def combined(self, module: str, updates: Updates) -> Combined:
        """Return the mean of trimmed values that have the elected sign, times their weights.

        It is taken of A and of B, or of the update, which is then cut to the rank.
        """
        weights, shares = (each(values, len(updates)) for values in (self.weights or 1.0, self.density))
        parts = Parts(self.of, weights, shares, self.drop, self.rank, self.scale)

        def join(values: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
            return mean_of_agreeing(values, factors, majority_signs(values, self.majority))

        return joined_parts(module, updates, parts, join)

    def total(self, modules: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return the relative error of the cut, in the Frobenius norm."""
        return {"error": relative_error(modules)} if self.of == "update" else {}
