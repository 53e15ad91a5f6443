"""Iso-C: gives all singular directions of the summed task vectors the same strength (Marczak et al. 2025, Algorithm
1)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import Convolutions, Excluded, Matrix, Rank, Stacks, wide
from mergecore.arithmetic.matrix_method import MatrixMethod
from mergecore.arithmetic.spectral import directions_of
from mergecore.arithmetic.trims import folded_sum
from mergecore.plugins.by_layer import Scale
from mergecore.plugins.examples import Examples


class IsoC(MatrixMethod):
    """Sum the task vectors, and give all singular directions of the sum the same strength: θ_0 + α σ̄ U Vᵀ.

    U and V hold the singular vectors of the sum, σ̄ is the mean of its singular values. A tensor that is not a matrix
    gets the mean task vector.
    """

    name: ClassVar[str] = "iso_c"
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
    rank: Rank = "numerical"
    convolutions: Convolutions = "mean"
    excluded: Excluded = ("*text_projection*",)
    stacks: Stacks = None

    @classmethod
    def examples(cls) -> Examples:
        forms = product(("numerical", "full"), ("mean", "flatten"))
        return Examples(
            golden=[{}, {"rank": "full", "convolutions": "flatten"}],
            others=[
                *({"scale": 0.8, "rank": rank, "convolutions": convolutions} for rank, convolutions in forms),
            ],
        )

    def revision(self, count: int) -> int:
        return self.version + (self.scale == 0)

    def change(self, deltas: Sequence[Tensor], matrix: Matrix) -> Tensor:
        """Return σ̄ U Vᵀ with U Σ Vᵀ = Σ τ_t; σ̄ is the mean of all min(m, n) singular values, zeros included."""
        matrices = [wide(delta, matrix) for delta in deltas]
        size = sum(float(values.norm()) for values in matrices)
        main, strengths = directions_of(folded_sum(matrices), size, self.rank)
        return main.left @ main.right * strengths.mean()
