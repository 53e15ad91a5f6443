"""TALL masks: one shared vector, and for each task a bit mask that says which of it the task wants (Wang et al. 2024,
§3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from mergecore.plugins.block import Block, Per
from mergecore.plugins.examples import Examples
from mergecore.plugins.statistic import Statistics
from mergecore.statistics.multi_task import MultiTaskArguments, MultiTaskMethod, multi_task_vector
from mergecore.tensors.dtypes import SAFETENSORS_DTYPE, Dtype
from mergecore.tensors.masked import mask_block, mask_outputs
from mergecore.tensors.source import TensorInfo


class TallMasks(MultiTaskMethod):
    """Keep one shared vector, and one bit per weight and expert. The model of task t is θ_0 + M_t ⊙ τ_m.

    The mask is M_t = |τ_t| > λ_t |τ_m − τ_t|. The comparison is strict, as in the authors' code. The result is not one
    model but a product: base, shared vector and masks. `mergeloom unpack` makes the model of any task from it.
    """

    name: ClassVar[str] = "tall_masks"
    paper: ClassVar[str] = (
        "Wang et al. 2024, Localizing task information for improved model merging and compression, arXiv:2405.07813"
    )
    per: ClassVar[Per] = Per.TENSOR
    product: ClassVar[str] = "masks"
    published: ClassVar[tuple[str, ...]] = (
        "the authors' task-arithmetic masks; a bit is packed as theirs, highest first, but tensor by tensor",
        "`multi_task: ties_published` their TIES masks",
    )

    vector: Annotated[Dtype, Field(description="dtype of the shared vector in the result")] = "float32"

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[{}, {"multi_task": "ties", "density": 0.4, "mask_scale": [0.2, 0.6, 0.4]}],
            others=[
                {"mask_scale": [0.2, 0.6, 0.4], "multi_task": "ties_published", "density": 0.4, "vector": "bfloat16"}
            ],
        )

    def outputs(self, selection: Mapping[str, TensorInfo], count: int) -> Mapping[str, TensorInfo]:
        """Return base, shared vector and masks."""
        return mask_outputs(selection, count, SAFETENSORS_DTYPE[self.vector], scaled=False)

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: MultiTaskArguments) -> Tensor:
        """Return τ_m, the vector that all tasks share."""
        return multi_task_vector(deltas, arguments)

    def merge_block(self, block: Block, statistics: Statistics) -> dict[str, Tensor]:
        """Return base, shared vector and masks of one tensor."""
        base, *deltas = block.models
        shared = self.merge(base, deltas, self.arguments(block, statistics))
        return mask_block(block.name, base, shared, self.masks(deltas, shared), None)
