"""EMR-Merging: elect one unified vector, mask it for each task, rescale it for each task (Huang et al. 2024, §4.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mergecore.plugins.block import Block, Per
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import DeltaMethod, NoArguments
from mergecore.plugins.statistic import Statistic, Statistics
from mergecore.statistics.unified_norms import UnifiedNorms, ZeroSign, unified
from mergecore.tensors.dtypes import SAFETENSORS_DTYPE, Dtype
from mergecore.tensors.masked import mask_block, mask_outputs
from mergecore.tensors.source import TensorInfo


class Emr(DeltaMethod[NoArguments]):
    """Keep one unified vector, and one bit per weight and one factor per expert. The model of task t is θ_0 + ρ_t M_t ⊙
    τ_uni.

    τ_uni has the sign of Σ τ_t, and the largest magnitude among the experts with that sign. M_t is 1 where τ_t has that
    sign too. ρ_t gives the task back as much change as it had. The result is a product of masks, from which `mergeloom
    unpack` makes the model of a task.
    """

    name: ClassVar[str] = "emr"
    paper: ClassVar[str] = (
        "Huang et al. 2024, EMR-Merging: tuning-free high-performance model merging, arXiv:2405.17461"
    )
    per: ClassVar[Per] = Per.TENSOR
    product: ClassVar[str] = "masks"
    published: ClassVar[tuple[str, ...]] = ("`rescale: tensors, zero_sign: negative` the authors' code",)

    rescale: Annotated[
        Literal["elements", "tensors"],
        Field(
            description=(
                "how ρ_t = Σ|τ_t| / Σ|M_t ⊙ τ_uni| is formed: 'elements', over all elements (the paper); "
                "'tensors', from each tensor's mean, so that every tensor counts the same (the authors' "
                "code)"
            )
        ),
    ] = "elements"
    zero_sign: ZeroSign = "drop"
    vector: Annotated[Dtype, Field(description="dtype of the unified vector in the result")] = "float32"

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[{}, {"rescale": "tensors", "zero_sign": "negative"}],
            others=[{"rescale": "tensors", "zero_sign": "negative", "vector": "float16"}],
        )

    @property
    def idempotent(self) -> bool:
        return False

    def statistics(self) -> Mapping[str, Statistic]:
        return {"norms": UnifiedNorms(zero_sign=self.zero_sign)}

    def outputs(self, selection: Mapping[str, TensorInfo], count: int) -> Mapping[str, TensorInfo]:
        """Return base, unified vector, masks and factors."""
        return mask_outputs(selection, count, SAFETENSORS_DTYPE[self.vector], scaled=True)

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: NoArguments) -> Tensor:
        """Return τ_uni, the vector that all tasks share."""
        return unified(deltas, self.zero_sign)[0]

    def merge_block(self, block: Block, statistics: Statistics) -> dict[str, Tensor]:
        """Return base, unified vector, masks and factors of one tensor."""
        base, *deltas = block.models
        shared, masks = unified(deltas, self.zero_sign)
        return mask_block(block.name, base, shared, masks, statistics["norms"][0].numbers[self.rescale])
