"""Iso-CTS: Iso-C with part of the directions given to each task alone (Marczak et al. 2025, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from math import floor
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import Convolutions, Excluded, Matrix, Rank, Stacks, wide
from mergecore.arithmetic.matrix_method import MatrixMethod
from mergecore.arithmetic.spectral import directions_of, orthonormal, side_by_side
from mergecore.arithmetic.trims import folded_sum
from mergecore.plugins.by_layer import Scale
from mergecore.plugins.examples import Examples


class IsoCts(MatrixMethod):
    """Do as Iso-C does, but take some of the directions from each task alone.

    The bases consist of the main directions of the sum and of the next directions of each task. They are made
    orthonormal, and all get the strength σ̄. A tensor that is not a matrix gets the mean task vector.
    """

    name: ClassVar[str] = "iso_cts"
    paper: ClassVar[str] = (
        "Marczak et al. 2025, No task left behind: isotropic model merging with common and task-specific "
        "subspaces, arXiv:2502.04959"
    )
    published: ClassVar[tuple[str, ...]] = ("`rank: full` the authors' code",)

    scale: Annotated[
        Scale,
        Field(
            description=(
                "α, the factor of the merged task vector; the authors choose it from 0.1 … 3.0 on validation data"
            )
        ),
    ] = 1.0
    common: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description=("share of the directions that come from the sum; the rest is divided evenly among the tasks"),
        ),
    ] = 0.8
    rank: Rank = "numerical"
    convolutions: Convolutions = "mean"
    excluded: Excluded = ("*text_projection*",)
    stacks: Stacks = None

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

    def revision(self, count: int) -> int:
        return self.version + (self.scale == 0)

    def dealt(self, directions: int, tasks: int) -> tuple[int, int]:
        """Return how many of r directions are common, and how many each task gets: k + T·s = r.

        (r − ⌊share·r⌋)/T is rounded to the nearest whole number, halves to even, as the authors do; never above ⌊r/T⌋,
        which theirs can exceed for small shares, so that k would be negative.
        """
        wanted = directions - floor(Fraction(str(self.common)) * directions)
        own = min(round(Fraction(wanted, tasks)), directions // tasks)
        return directions - own * tasks, own

    def change(self, deltas: Sequence[Tensor], matrix: Matrix) -> Tensor:
        """Return σ̄ P(U) P(V)ᵀ: U and V are the tasks' own directions, then the common ones; P is the polar factor."""
        matrices = [wide(delta, matrix) for delta in deltas]
        norms = [float(values.norm()) for values in matrices]
        common, own = self.dealt(min(matrix), len(matrices))
        shared = directions_of(folded_sum(matrices), sum(norms), self.rank)[0].strongest(common)
        parts = []
        for values, norm in zip(matrices, norms, strict=True):
            # Only the left side is freed of the common part, so the right bases overlap until the polar step.
            rest = values - shared.left @ (shared.left.mT @ values)
            parts.append(directions_of(rest, norm, self.rank)[0].strongest(own))
        merged = orthonormal(side_by_side([*parts, shared]), self.rank)
        # What was left out as rounding counts as 0 here, as the zeros of a deficient matrix do in Iso-C.
        return merged.left @ merged.right * (merged.strengths.sum() / min(matrix))
