"""Subspace Boosting: weak singular directions of the summed task vectors made stronger (Skorobogat et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import Convolutions, Excluded, Matrix, Rank, Stacks, combination, wide
from mergecore.arithmetic.matrix_method import MatrixMethod
from mergecore.arithmetic.spectral import directions_of
from mergecore.arithmetic.trims import folded_sum
from mergecore.checkpoints.architectures import EMBEDDINGS, HEADS
from mergecore.plugins.by_layer import Scale
from mergecore.plugins.examples import Examples

MET = 1 - 1e-9
"""A share that is met to a billionth counts as met, whichever way the sum was rounded."""


class SubspaceBoosting(MatrixMethod):
    """Add up the task vectors, and raise the small singular values of the sum to the value at the cut.

    The sum of many task vectors has a few strong directions and many weak ones. The strongest ones whose values make up
    the share β stay as they are; all others get the value of the last of them. What is no matrix is summed.
    """

    name: ClassVar[str] = "subspace_boosting"
    paper: ClassVar[str] = "Skorobogat et al. 2025, Subspace-boosted model merging, arXiv:2506.16506"
    published: ClassVar[tuple[str, ...]] = (
        "`rank: full` two public re-implementations, without a split of q, k, v; the authors' own code was not at hand",
    )

    scale: Annotated[Scale, Field(description="λ, the factor of the boosted sum; 1/T for a mean of T experts")]
    share: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="β: the strongest directions whose values make up this share of the sum of all stay; 0: the "
            "strongest alone, so that all are equal; 1: none is boosted",
        ),
    ] = 0.01
    rank: Rank = "numerical"
    convolutions: Convolutions = "mean"
    excluded: Excluded = (*EMBEDDINGS, *HEADS)
    stacks: Stacks = None

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[{"scale": 0.5}, {"scale": 0.4, "share": 0.3, "convolutions": "flatten"}],
            others=[{"scale": 0.8, "share": 1.0, "rank": "full"}, {"scale": {"first": 0.5, "last": 1.0}, "share": 0}],
        )

    def of_vector(self, base: Tensor, deltas: Sequence[Tensor]) -> Tensor:
        """Return θ_0 + λ Σ τ_t."""
        return combination([1.0] + [self.factor] * len(deltas), [base, *deltas])

    def change(self, deltas: Sequence[Tensor], matrix: Matrix) -> Tensor:
        """Return U max(Σ, σ_k) Vᵀ with U Σ Vᵀ = Σ τ_t, k the least with σ_1 + … + σ_k ≥ share · Σσ."""
        matrices = [wide(delta, matrix) for delta in deltas]
        size = sum(float(values.norm()) for values in matrices)
        main, _ = directions_of(folded_sum(matrices), size, self.rank)
        strengths = main.strengths
        cut = int((strengths.cumsum(0) < strengths.sum() * self.share * MET).sum())
        boosted = strengths.clamp(min=float(strengths[cut])) if len(strengths) else strengths
        return main.left * boosted @ main.right
