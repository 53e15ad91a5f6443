"""TSV-Merge: each task's main singular vectors side by side, made orthonormal (Gargiulo et al. 2025, §4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import (
    Convolutions,
    Excluded,
    Rank,
    base_and_matrix,
    base_and_mean,
    decomposition,
    matrix_of,
    polar_factor,
    rank_of,
    wide,
)
from mergecore.plugins.block import Block, Per
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import Method
from mergecore.plugins.statistic import Statistics


class TsvM(Method):
    """The base plus P(Û) Σ̂ P(V̂)ᵀ of the tasks' top singular triplets; whatever is not a matrix gets the mean."""

    name: ClassVar[str] = "tsv_m"
    paper: ClassVar[str] = (
        "Gargiulo et al. 2025, Task singular vectors: reducing task interference in model merging, arXiv:2412.00081"
    )
    published: ClassVar[tuple[str, ...]] = ("`rank: full, crowded: zero` the authors' code",)
    per: ClassVar[Per] = Per.TENSOR
    idempotent: ClassVar[bool] = False

    scale: Annotated[float, Field(description="α, the factor of the merged task vector")] = 1.0
    rank: Rank = "numerical"
    crowded: Annotated[
        Literal["mean", "zero"],
        Field(
            description="matrices with fewer rows or columns than there are tasks, so that ⌊r/T⌋ = 0 triplets are left: "
            "the mean, as for vectors, or no change at all (the authors' code)"
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
                {"crowded": "zero"},
            ],
        )

    @property
    def on(self) -> str:
        """Deltas."""
        return "deltas"

    def arguments(self, block: Block, statistics: Statistics) -> dict[str, Any]:
        """The matrix that the tensor is, if it is one."""
        return {"matrix": matrix_of(block.name, block.shape, self.convolutions, self.excluded)}

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], **arguments: Any) -> Tensor:
        """θ_0 + α P(Û) Σ̂ P(V̂)ᵀ from the top ⌊r/T⌋ triplets of each τ_t, r = min(m, n) (Algorithm 1).

        P is the polar factor, the paper's solution of the Procrustes problem (its equation 8).
        """
        assert base is not None
        matrix = arguments["matrix"]
        triplets = 0 if matrix is None else min(matrix) // len(experts)
        if matrix is None or (triplets == 0 and self.crowded == "mean"):
            return base_and_mean(base, experts, self.scale)
        lefts, strengths, rights = [], [], []
        for expert in experts:
            delta = wide(expert, matrix)
            left, values, right = decomposition(delta)
            # A triplet of strength 0 adds nothing by itself, but its arbitrary vectors would bend those of the others.
            kept = min(triplets, rank_of(values, float(delta.norm()), self.rank))
            lefts.append(left[:, :kept])
            strengths.append(values[:kept])
            rights.append(right[:kept])
        outer = polar_factor(torch.cat(lefts, 1), self.rank)
        inner = polar_factor(torch.cat(rights), self.rank)
        return base_and_matrix(base, outer * torch.cat(strengths) @ inner, self.scale)
