"""STAR: each task vector cut to its strongest singular directions and given its nuclear norm back (Lee et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import Convolutions, Excluded, Matrix, Rank, Stacks, wide
from mergecore.arithmetic.matrix_method import MatrixMethod
from mergecore.arithmetic.spectral import directions_of
from mergecore.checkpoints.architectures import EMBEDDINGS, HEADS
from mergecore.plugins.by_layer import Scale
from mergecore.plugins.examples import Examples

MET = 1 - 1e-9
"""A share that is met to a billionth counts as met, whichever way the sum was rounded."""


class Star(MatrixMethod):
    """Cut each task vector to its main singular directions, scale it back to its old size, and average."""

    name: ClassVar[str] = "star"
    paper: ClassVar[str] = "Lee et al. 2025, STAR: spectral truncation and rescale for model merging, arXiv:2502.10339"
    published: ClassVar[tuple[str, ...]] = (
        "`share: 0.4, rank: full` the authors' code with `--eta 40` on the matrices it is applied to",
    )

    share: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="η/100: of each task vector the fewest singular directions stay whose strengths make up this "
            "share of the sum of all, the nuclear norm; their strengths then grow until they make up all of it",
        ),
    ] = 0.4
    scale: Annotated[Scale, Field(description="factor of the merged task vector; the authors need none")] = 1.0
    rank: Rank = "numerical"
    convolutions: Convolutions = "mean"
    excluded: Excluded = (*EMBEDDINGS, *HEADS)
    stacks: Stacks = None

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[{}, {"share": 0.75, "convolutions": "flatten"}],
            others=[{"share": 1.0, "scale": 0.8, "rank": "full"}, {"scale": {"first": 0.5, "last": 1.0}}],
        )

    def change(self, deltas: Sequence[Tensor], matrix: Matrix) -> Tensor:
        """Return the mean of U_r (σ_r · Σσ / Σσ_r) V_rᵀ, r the least with σ_1 + … + σ_r ≥ share · Σσ."""
        total = torch.zeros(matrix, dtype=torch.float64)
        for delta in deltas:
            values = wide(delta, matrix)
            main, _ = directions_of(values, float(values.norm()), self.rank)
            whole = main.strengths.sum()
            if whole > 0:
                needed = int((main.strengths.cumsum(0) < whole * self.share * MET).sum()) + 1
                kept = main.strongest(needed)
                total += kept.left * (kept.strengths * (whole / kept.strengths.sum())) @ kept.right
        return total / len(deltas)
