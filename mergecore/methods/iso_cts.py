"""Iso-CTS: Iso-C with part of the directions given to each task alone (Marczak et al. 2025, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from math import floor
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import Convolutions, Excluded, Rank, base_and_matrix, base_and_mean, wide
from mergecore.arithmetic.spectral import MatrixArguments, directions_of, matrix_arguments, orthonormal, side_by_side
from mergecore.arithmetic.trims import folded_sum
from mergecore.plugins.block import Block, Per
from mergecore.plugins.by_layer import Scale
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import DeltaMethod
from mergecore.plugins.statistic import Statistics


class IsoCts(DeltaMethod[MatrixArguments]):
    """σ̄ times orthonormal bases made of the sum's main directions and of each task's own; not matrices: the mean."""

    name: ClassVar[str] = "iso_cts"
    paper: ClassVar[str] = (
        "Marczak et al. 2025, No task left behind: isotropic model merging with common and task-specific "
        "subspaces, arXiv:2502.04959"
    )
    published: ClassVar[tuple[str, ...]] = ("`rank: full` the authors' code",)
    per: ClassVar[Per] = Per.TENSOR

    scale: Annotated[
        Scale,
        Field(
            description="α, the factor of the merged task vector; the authors choose it out of 0.1 … 3.0 on validation "
            "data"
        ),
    ] = 1.0
    common: Annotated[
        float,
        Field(ge=0, le=1, description="share of the directions taken from the sum; the rest is dealt evenly to tasks"),
    ] = 0.8
    rank: Rank = "numerical"
    convolutions: Convolutions = "mean"
    excluded: Excluded = ("*text_projection*",)

    @classmethod
    def examples(cls) -> Examples:
        forms = product(("numerical", "full"), ("mean", "flatten"))
        return Examples(
            golden=[{"common": 0.5}],
            others=[
                *({"scale": 0.8, "rank": rank, "convolutions": convolutions} for rank, convolutions in forms),
                {"common": 0.3, "excluded": ["*.m"]},
            ],
        )

    @property
    def idempotent(self) -> bool:
        return False

    def arguments(self, block: Block, statistics: Statistics) -> MatrixArguments:
        return matrix_arguments(block, self.convolutions, self.excluded)

    def dealt(self, directions: int, tasks: int) -> tuple[int, int]:
        """Return how many of r directions are common, and how many each task gets: k + T·s = r.

        (r − ⌊share·r⌋)/T is rounded to the nearest whole number, halves to even, as the authors do; never above ⌊r/T⌋,
        which theirs can exceed for small shares, so that k would be negative.
        """
        wanted = directions - floor(Fraction(str(self.common)) * directions)
        own = min(round(Fraction(wanted, tasks)), directions // tasks)
        return directions - own * tasks, own

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: MatrixArguments) -> Tensor:
        """Return θ_0 + α σ̄ P(U) P(V)ᵀ: U and V are the tasks' own directions, then the common ones; P is the polar
        factor."""
        if arguments.matrix is None:
            return base_and_mean(base, deltas, self.scale)
        matrices = [wide(delta, arguments.matrix) for delta in deltas]
        norms = [float(matrix.norm()) for matrix in matrices]
        common, own = self.dealt(min(arguments.matrix), len(matrices))
        shared = directions_of(folded_sum(matrices), sum(norms), self.rank)[0].strongest(common)
        parts = []
        for matrix, norm in zip(matrices, norms, strict=True):
            # Only the left side is freed of the common part, so the right bases overlap until the polar step.
            rest = matrix - shared.left @ (shared.left.mT @ matrix)
            parts.append(directions_of(rest, norm, self.rank)[0].strongest(own))
        merged = orthonormal(side_by_side([*parts, shared]), self.rank)
        # What was left out as rounding counts as 0 here, as the zeros of a deficient matrix do in Iso-C.
        mean = merged.strengths.sum() / min(arguments.matrix)
        return base_and_matrix(base, merged.left @ merged.right * mean, self.scale)
