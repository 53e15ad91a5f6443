"""TSV-Merge: each task's main singular vectors side by side, made orthonormal (Gargiulo et al. 2025, §4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import Convolutions, Excluded, Matrix, Rank, Stacks, wide
from mergecore.arithmetic.matrix_method import MatrixMethod
from mergecore.arithmetic.spectral import directions_of, orthonormal, side_by_side
from mergecore.plugins.by_layer import Scale
from mergecore.plugins.examples import Examples


class TsvM(MatrixMethod):
    """Put the main singular vectors of all tasks side by side, make them orthonormal, and rebuild one matrix from them.

    The result is θ_0 + α P(Û) Σ̂ P(V̂)ᵀ, where P is the polar factor. A tensor that is not a matrix gets the mean task
    vector.
    """

    name: ClassVar[str] = "tsv_m"
    paper: ClassVar[str] = (
        "Gargiulo et al. 2025, Task singular vectors: reducing task interference in model merging, arXiv:2412.00081"
    )
    published: ClassVar[tuple[str, ...]] = ("`rank: full, crowded: zero` the authors' code",)

    scale: Annotated[Scale, Field(description="α, the factor of the merged task vector")] = 1.0
    rank: Rank = "numerical"
    crowded: Annotated[
        Literal["mean", "zero"],
        Field(
            description=(
                "what a matrix gets that has fewer rows or columns than there are tasks, so that ⌊r/T⌋ = "
                "0 triplets are left: 'mean', the mean task vector; 'zero', no change (the authors' code)"
            )
        ),
    ] = "mean"
    convolutions: Convolutions = "mean"
    excluded: Excluded = ("*text_projection*",)
    stacks: Stacks = None

    @classmethod
    def examples(cls) -> Examples:
        forms = product(("numerical", "full"), ("mean", "flatten"))
        return Examples(
            others=[
                *({"scale": 0.8, "rank": rank, "convolutions": convolutions} for rank, convolutions in forms),
                {"crowded": "zero", "scale": {"first": 0.3, "last": 1.2, "others": 0.5}},
            ],
        )

    def revision(self, count: int) -> int:
        return self.version + (self.scale == 0)

    def takes(self, matrix: Matrix, count: int) -> bool:
        return min(matrix) >= count or self.crowded == "zero"

    def change(self, deltas: Sequence[Tensor], matrix: Matrix) -> Tensor:
        """Return P(Û) Σ̂ P(V̂)ᵀ from the top ⌊r/T⌋ triplets of each τ_t, r = min(m, n) (Algorithm 1).

        P is the polar factor, the paper's solution of the Procrustes problem (its equation 8).
        """
        parts = []
        for delta in deltas:
            values = wide(delta, matrix)
            # A triplet of strength 0 adds nothing by itself, but its arbitrary vectors would bend those of the others.
            strongest = directions_of(values, float(values.norm()), self.rank)[0].strongest(min(matrix) // len(deltas))
            parts.append(strongest)
        merged = orthonormal(side_by_side(parts), self.rank)
        return merged.left * merged.strengths @ merged.right
