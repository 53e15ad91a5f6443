"""TSV-Merge: each task's main singular vectors side by side, made orthonormal (Gargiulo et al. 2025, §4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import Convolutions, Excluded, Rank, base_and_matrix, base_and_mean, wide
from mergecore.arithmetic.spectral import MatrixArguments, directions_of, matrix_arguments, orthonormal, side_by_side
from mergecore.plugins.block import Block, Per
from mergecore.plugins.by_layer import Scale
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import DeltaMethod
from mergecore.plugins.statistic import Statistics


class TsvM(DeltaMethod[MatrixArguments]):
    """The base plus P(Û) Σ̂ P(V̂)ᵀ of the tasks' top singular triplets; whatever is not a matrix gets the mean."""

    name: ClassVar[str] = "tsv_m"
    paper: ClassVar[str] = (
        "Gargiulo et al. 2025, Task singular vectors: reducing task interference in model merging, arXiv:2412.00081"
    )
    published: ClassVar[tuple[str, ...]] = ("`rank: full, crowded: zero` the authors' code",)
    per: ClassVar[Per] = Per.TENSOR

    scale: Annotated[Scale, Field(description="α, the factor of the merged task vector")] = 1.0
    rank: Rank = "numerical"
    crowded: Annotated[
        Literal["mean", "zero"],
        Field(
            description="matrices with fewer rows or columns than there are tasks, so that ⌊r/T⌋ = 0 triplets are "
            "left: the mean, as for vectors, or no change at all (the authors' code)"
        ),
    ] = "mean"
    convolutions: Convolutions = "mean"
    excluded: Excluded = ("*text_projection*",)

    @classmethod
    def examples(cls) -> Examples:
        forms = product(("numerical", "full"), ("mean", "flatten"))
        return Examples(
            others=[
                *({"scale": 0.8, "rank": rank, "convolutions": convolutions} for rank, convolutions in forms),
                {"crowded": "zero", "scale": {"first": 0.3, "last": 1.2, "others": 0.5}},
            ],
        )

    @property
    def idempotent(self) -> bool:
        return False

    def arguments(self, block: Block, statistics: Statistics) -> MatrixArguments:
        return matrix_arguments(block, self.convolutions, self.excluded)

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: MatrixArguments) -> Tensor:
        """Return θ_0 + α P(Û) Σ̂ P(V̂)ᵀ from the top ⌊r/T⌋ triplets of each τ_t, r = min(m, n) (Algorithm 1).

        P is the polar factor, the paper's solution of the Procrustes problem (its equation 8).
        """
        triplets = 0 if arguments.matrix is None else min(arguments.matrix) // len(deltas)
        if arguments.matrix is None or (triplets == 0 and self.crowded == "mean"):
            return base_and_mean(base, deltas, self.scale)
        parts = []
        for delta in deltas:
            matrix = wide(delta, arguments.matrix)
            # A triplet of strength 0 adds nothing by itself, but its arbitrary vectors would bend those of the others.
            parts.append(directions_of(matrix, float(matrix.norm()), self.rank)[0].strongest(triplets))
        merged = orthonormal(side_by_side(parts), self.rank)
        return base_and_matrix(base, merged.left * merged.strengths @ merged.right, self.scale)
