"""The multi-task vector of several experts, and which of its coordinates a task wants (Wang et al. 2024, §3–4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from mergecore.arithmetic.trims import agreeing, elected_sign, folded_sum
from mergecore.plugins.block import Block
from mergecore.plugins.method import DeltaMethod
from mergecore.plugins.per_expert import check_each, each, moved
from mergecore.plugins.statistic import Statistic, Statistics
from mergecore.statistics.sign_majority import SignMajority, majority_sign
from mergecore.statistics.threshold import Threshold, Trims, trimmed_deltas, trims

DENSITY = 0.2
"""The share that the authors let TIES keep."""

MultiTask = Annotated[
    Literal["sum", "ties", "ties_published"],
    Field(
        description=(
            "how the multi-task vector τ_m is formed: 'sum' adds the task vectors; 'ties' trims them "
            "over the whole model, elects signs and adds what agrees; 'ties_published' does that as "
            "the authors' code, which trims and treats exact cancellations in another way"
        )
    ),
]
TrimDensity = Annotated[
    float | None, Field(ge=0, le=1, description="share of each task vector that TIES keeps; none: 0.2")
]
MaskScale = Annotated[
    tuple[Annotated[float, Field(ge=0)], ...] | Annotated[float, Field(ge=0)],
    Field(description=("λ, or one λ_t per expert in the order of the recipe; a larger one makes masks sparser")),
]


@dataclass(frozen=True)
class MultiTaskArguments:
    """What `multi_task_vector` needs for one block.

    trims: for TIES, where each expert is cut; None: τ_m is the sum. zero: the sign where the trimmed values cancel
    exactly.
    """

    trims: Trims | None = None
    zero: float | None = None


class MultiTaskMethod(DeltaMethod[MultiTaskArguments]):
    """A method that forms τ_m of all experts and asks of each task which coordinates of it the task wants."""

    mask_scale: MaskScale = 0.4
    multi_task: MultiTask = "sum"
    density: TrimDensity = None

    @model_validator(mode="after")
    def _only_ties_trims(self) -> Self:
        if self.multi_task == "sum" and self.density is not None:
            raise ValueError("density is what 'ties' keeps: leave it out with multi_task 'sum'")
        return self

    @property
    def idempotent(self) -> bool:
        return False

    @property
    def threshold(self) -> Threshold:
        """The trim of TIES as a statistic."""
        kept = DENSITY if self.density is None else self.density
        return Threshold(density=kept, count="published" if self.multi_task == "ties_published" else "at_least")

    def statistics(self) -> Mapping[str, Statistic]:
        """Return nothing for the sum; for TIES each expert's threshold, and the majority sign where it decides."""
        if self.multi_task == "sum":
            return {}
        majority = {"majority": SignMajority(threshold=self.threshold)} if self.multi_task == "ties_published" else {}
        return {"threshold": self.threshold, **majority}

    def validate_count(self, count: int) -> None:
        check_each("mask_scale", self.mask_scale, count)

    def bound(self, order: Sequence[int]) -> Self:
        return self.model_copy(update={"mask_scale": moved(self.mask_scale, order)})

    def arguments(self, block: Block, statistics: Statistics) -> MultiTaskArguments:
        """Return what `multi_task_vector` needs for a block."""
        if self.multi_task == "sum":
            return MultiTaskArguments()
        zero = majority_sign(statistics) if "majority" in statistics else None
        return MultiTaskArguments(trims(self.threshold, block, statistics), zero)

    def masks(self, deltas: Sequence[Tensor], together: Tensor) -> list[Tensor]:
        """Return for each task M_t = |τ_t| > λ_t |τ_m − τ_t|, true where the task wants τ_m (`together`).

        The comparison is strict, as in the authors' code: what nobody changes is in no mask.
        """
        scales = each(self.mask_scale, len(deltas))
        return [delta.abs() > (together - delta).abs() * scale for delta, scale in zip(deltas, scales, strict=True)]


def multi_task_vector(deltas: Sequence[Tensor], arguments: MultiTaskArguments) -> Tensor:
    """Return τ_m of one block, from the experts' τ_t."""
    if arguments.trims is None:
        return folded_sum(deltas)
    trimmed = trimmed_deltas(deltas, arguments.trims)
    return folded_sum(agreeing(trimmed, elected_sign(trimmed, arguments.zero)))
