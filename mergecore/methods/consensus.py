"""Consensus merging: what fewer than k task masks want is cut out of the multi-task vector (Wang et al. 2024, §4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.trims import added, folded_sum
from mergecore.plugins.by_layer import Scale
from mergecore.plugins.examples import Examples
from mergecore.statistics.multi_task import MultiTaskArguments, MultiTaskMethod, multi_task_vector


class Consensus(MultiTaskMethod):
    """Remove from the multi-task vector what fewer than k tasks want: θ_0 + α · [Σ_t M_t ≥ k] ⊙ τ_m.

    The TALL mask M_t = |τ_t| > λ_t |τ_m − τ_t| says what task t wants. k = 1 removes what no task wants. k = 2 also
    removes what one task alone wants. k = 0 keeps all of τ_m. A k above the number of experts gives the base. The
    comparison is strict, as in the authors' code.
    """

    name: ClassVar[str] = "consensus"
    paper: ClassVar[str] = (
        "Wang et al. 2024, Localizing task information for improved model merging and compression, arXiv:2405.07813"
    )
    published: ClassVar[tuple[str, ...]] = (
        "the authors' code, of `multi_task: sum`",
        "`multi_task: ties_published` its Consensus TIES",
    )

    scale: Annotated[Scale, Field(description="α, the factor of the masked multi-task vector")]
    minimum_tasks: Annotated[int, Field(ge=0, description="k, how many tasks must want a coordinate")] = 2

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[
                {"scale": 0.5},
                {"scale": 1.0, "mask_scale": [0.2, 0.6, 0.4], "multi_task": "ties", "minimum_tasks": 1},
                {"scale": 0.7, "multi_task": "ties_published", "density": 0.4},
            ],
            others=[
                {"scale": 0.5, "mask_scale": [0.2, 0.6, 0.4], "multi_task": "ties", "density": 0.4},
                {"scale": 1.0, "multi_task": "ties_published", "minimum_tasks": 1},
            ],
        )

    def revision(self, count: int) -> int:
        return self.version + (self.scale == 0)

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: MultiTaskArguments) -> Tensor:
        """Return θ_0 + α τ_m where at least k masks agree, θ_0 elsewhere."""
        together = multi_task_vector(deltas, arguments)
        masks = [torch.where(mask, 1.0, 0.0) for mask in self.masks(deltas, together)]
        kept = torch.where(folded_sum(masks) >= self.minimum_tasks, together, 0.0)
        return added(base, kept, self.scale)
