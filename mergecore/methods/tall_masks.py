"""TALL masks: one shared vector, and for each task a bit mask that says which of it the task wants (Wang et al. 2024,
§3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from mergecore.plugins.block import Block, Per
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import DeltaMethod
from mergecore.plugins.per_expert import check_each, each, moved
from mergecore.plugins.statistic import Statistic, Statistics
from mergecore.statistics.multi_task import (
    MaskScale,
    MultiTask,
    MultiTaskArguments,
    MultiTaskRule,
    TrimDensity,
    multi_task_vector,
    task_masks,
)
from mergecore.tensors.dtypes import SAFETENSORS_DTYPE, Dtype
from mergecore.tensors.masked import mask_block, mask_outputs
from mergecore.tensors.source import TensorInfo


class TallMasks(DeltaMethod[MultiTaskArguments]):
    """Keeps of every expert one bit a weight: M_t = |τ_t| > λ_t |τ_m − τ_t|; the model of task t is θ_0 + M_t ⊙ τ_m.

    What is written is no model but a product of masks (mergecore/tensors/masked.py): base, shared vector and bits, from
    which `mergeloom unpack` makes the model of any task. The comparison is strict, as in the authors' code.
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

    mask_scale: MaskScale = 0.4
    multi_task: MultiTask = "sum"
    density: TrimDensity = None
    vector: Annotated[Dtype, Field(description="dtype in which the shared vector is kept")] = "float32"

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[{}, {"multi_task": "ties", "density": 0.4, "mask_scale": [0.2, 0.6, 0.4]}],
            others=[
                {"mask_scale": [0.2, 0.6, 0.4], "multi_task": "ties_published", "density": 0.4, "vector": "bfloat16"}
            ],
        )

    @model_validator(mode="after")
    def _only_ties_trims(self) -> TallMasks:
        self.rule.check()
        return self

    @property
    def rule(self) -> MultiTaskRule:
        """How the multi-task vector is formed."""
        return MultiTaskRule(self.multi_task, self.density)

    @property
    def idempotent(self) -> bool:
        return False

    def statistics(self) -> Mapping[str, Statistic]:
        return self.rule.statistics()

    def validate_count(self, count: int) -> None:
        check_each("mask_scale", self.mask_scale, count)

    def bound(self, order: Sequence[int]) -> TallMasks:
        return self.model_copy(update={"mask_scale": moved(self.mask_scale, order)})

    def arguments(self, block: Block, statistics: Statistics) -> MultiTaskArguments:
        return self.rule.arguments(block, statistics)

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
        masks = task_masks(deltas, shared, each(self.mask_scale, len(deltas)))
        return mask_block(block.name, base, shared, masks, None)
