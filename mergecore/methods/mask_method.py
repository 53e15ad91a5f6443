"""The multi-task vector of several experts, and which of its coordinates a task wants (Wang et al. 2024, §3–4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from mergecore.arithmetic.trims import agreeing, elected_sign, folded_sum
from mergecore.plugins.block import Block
from mergecore.plugins.method import Method
from mergecore.plugins.per_expert import check_each, moved
from mergecore.plugins.statistic import Statistic, Statistics
from mergecore.statistics.sign_majority import SignMajority
from mergecore.statistics.threshold import Threshold, trimmed_deltas, trims

DENSITY = 0.2
"""The share that the authors let TIES keep."""

MultiTask = Annotated[
    Literal["sum", "ties", "ties_published"],
    Field(
        description="τ_m: 'sum' of task vectors; 'ties': trimmed model-wide, sign elected, those that agree summed; "
        "'ties_published': the same as the authors' code trims and settles exact cancellations"
    ),
]
TrimDensity = Annotated[
    float | None, Field(ge=0, le=1, description="share of each task vector that TIES keeps; none: 0.2")
]
MaskScale = Annotated[
    tuple[Annotated[float, Field(ge=0)], ...] | Annotated[float, Field(ge=0)],
    Field(description="λ, or one λ_t per expert in the order of the recipe; larger: sparser masks"),
]


def _threshold(kind: str, density: float | None) -> Threshold:
    kept = DENSITY if density is None else density
    return Threshold(density=kept, count="published" if kind == "ties_published" else "at_least")


def multi_task_statistics(kind: str, density: float | None) -> dict[str, Statistic]:
    """Nothing for the sum; for TIES each expert's threshold, and the majority sign where it decides something."""
    if kind == "sum":
        return {}
    threshold = _threshold(kind, density)
    majority = {"majority": SignMajority(threshold=threshold)} if kind == "ties_published" else {}
    return {"threshold": threshold, **majority}


def multi_task_arguments(kind: str, density: float | None, block: Block, statistics: Statistics) -> dict[str, Any]:
    """For TIES where each expert is cut, and the sign that stands where the trimmed values cancel exactly."""
    if kind == "sum":
        return {"trims": None, "zero": None}
    zero = float(statistics["majority"][0].numbers["sign"]) or -1.0 if "majority" in statistics else None
    return {"trims": trims(_threshold(kind, density), block, statistics), "zero": zero}


def multi_task_vector(deltas: Sequence[Tensor], arguments: Mapping[str, Any]) -> Tensor:
    """τ_m of one block, from the experts' τ_t."""
    if arguments["trims"] is None:
        return folded_sum(deltas)
    trimmed = trimmed_deltas(deltas, arguments["trims"])
    return folded_sum(agreeing(trimmed, elected_sign(trimmed, arguments["zero"])))


def task_masks(deltas: Sequence[Tensor], together: Tensor, scales: Sequence[float]) -> list[Tensor]:
    """M_t = |τ_t| > λ_t |τ_m − τ_t|, strictly as in the authors' code: what nobody changes is in no mask."""
    return [delta.abs() > (together - delta).abs() * scale for delta, scale in zip(deltas, scales, strict=True)]


class MaskMethod(Method):
    """What methods of TALL masks M_t = |τ_t| > λ_t |τ_m − τ_t| have in common."""

    mask_scale: MaskScale = 0.4
    multi_task: MultiTask = "sum"
    density: TrimDensity = None

    @model_validator(mode="after")
    def _only_ties_trims(self) -> Self:
        if self.multi_task == "sum" and self.density is not None:
            raise ValueError("density is what 'ties' keeps: leave it out with multi_task 'sum'")
        return self

    @property
    def on(self) -> str:
        """Deltas."""
        return "deltas"

    def statistics(self) -> Mapping[str, Statistic]:
        """What TIES must know beforehand."""
        return multi_task_statistics(self.multi_task, self.density)

    def validate_count(self, count: int) -> None:
        """One λ, or one per expert."""
        check_each("mask_scale", self.mask_scale, count)

    def bound(self, order: Sequence[int]) -> Self:
        """Each λ_t moved along with its expert."""
        return self.model_copy(update={"mask_scale": moved(self.mask_scale, order)})

    def arguments(self, block: Block, statistics: Statistics) -> dict[str, Any]:
        """For TIES where each expert is cut, and the sign that stands where the trimmed values cancel exactly."""
        return multi_task_arguments(self.multi_task, self.density, block, statistics)
