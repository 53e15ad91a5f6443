"""CART: the average, plus what is left of each expert's difference from it at a low rank (Choi et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import floor
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import Convolutions, Excluded, Matrix, Rank, Stacks, wide
from mergecore.arithmetic.matrix_method import MatrixMethod
from mergecore.arithmetic.spectral import directions_of
from mergecore.arithmetic.trims import folded_sum
from mergecore.checkpoints.architectures import EMBEDDINGS, HEADS
from mergecore.plugins.by_layer import Scale
from mergecore.plugins.examples import Examples


class Cart(MatrixMethod):
    """Count task vectors from the average of the experts, not from the base: θ_avg + λ Σ_t SVD_k(θ_t − θ_avg).

    Of what is not a matrix the differences add up to 0, and the average stays.
    """

    name: ClassVar[str] = "cart"
    paper: ClassVar[str] = (
        "Choi et al. 2024, Revisiting weight averaging for model merging, arXiv:2412.12153 (centered arithmetic with "
        "rank-reduced task vectors)"
    )
    published: ClassVar[tuple[str, ...]] = (
        "`scale: 2, share: 0.12, rank: full` the authors' code and its configuration for 8 tasks, on attention and MLP",
    )

    scale: Annotated[
        Scale,
        Field(description="λ, the factor of the summed differences; the authors take 2 of 8 tasks"),
    ] = 1.0
    share: Annotated[
        float,
        Field(
            ge=0, le=1, description="k/r: of the min(m, n) singular directions ⌊share · r⌋ stay, at least one; 0: none"
        ),
    ] = 0.12
    rank: Rank = "numerical"
    convolutions: Convolutions = "mean"
    excluded: Excluded = (*EMBEDDINGS, *HEADS)
    stacks: Stacks = None

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[{}, {"scale": 2.0, "share": 0.3, "convolutions": "flatten"}],
            others=[{"scale": 0.8, "share": 1.0, "rank": "full"}, {"share": 0}, {"scale": {"first": 0.5, "last": 1.0}}],
        )

    @property
    def factor(self) -> float:
        return 1.0

    def change(self, deltas: Sequence[Tensor], matrix: Matrix) -> Tensor:
        """Return mean(τ_t) + λ Σ_t SVD_k(τ_t − mean(τ_t)), k = max(1, ⌊share · min(m, n)⌋)."""
        matrices = [wide(delta, matrix) for delta in deltas]
        mean = folded_sum(matrices) / len(matrices)
        count = max(1, floor(Fraction(str(self.share)) * min(matrix))) if self.share else 0
        total, length = mean, float(mean.norm())
        for values in matrices if count else ():
            size = float(values.norm()) + length
            kept = directions_of(values - mean, size, self.rank)[0].strongest(count)
            total = total + kept.left * kept.strengths @ kept.right * self.scale
        return total
