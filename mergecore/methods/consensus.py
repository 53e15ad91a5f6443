"""Consensus merging: what fewer than k task masks want is cut out of the multi-task vector (Wang et al. 2024, §4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mergecore.coefficients import check_coefficients, reordered, spread
from mergecore.method import Block, Method, Statistic, Statistics
from mergecore.statistics.sign_majority import SignMajority, trimmed_deltas, trims
from mergecore.statistics.threshold import Threshold
from mergecore.trims import agreeing, elected_sign, folded_sum

DENSITY = 0.2
"""The share that the authors let TIES keep."""


class Consensus(Method):
    """θ_0 + α · [Σ_t M_t ≥ k] ⊙ τ_m with TALL masks M_t = |τ_t| > λ_t |τ_m − τ_t|, worked out where they are needed.

    With k = 2 what no task wants (catastrophic) and what one alone wants (selfish) goes, with k = 1 the former; k = 0
    leaves τ_m as it is, k above the number of experts leaves the base. The comparison is strict, as in the authors' code.
    """

    name: ClassVar[str] = "consensus"
    idempotent: ClassVar[bool] = False

    scale: Annotated[float, Field(description="α, the factor of the masked multi-task vector")]
    minimum_tasks: Annotated[int, Field(ge=0, description="k, how many masks must hold a coordinate")] = 2
    mask_scale: Annotated[
        tuple[Annotated[float, Field(ge=0)], ...] | Annotated[float, Field(ge=0)],
        Field(description="λ, or one λ_t per expert in the order of the recipe; larger: sparser masks"),
    ] = 0.4
    multi_task: Annotated[
        Literal["sum", "ties", "ties_published"],
        Field(
            description="τ_m: 'sum' of task vectors; 'ties': trimmed model-wide, sign elected, those that agree summed; "
            "'ties_published': the same as the authors' code trims and settles exact cancellations"
        ),
    ] = "sum"
    density: Annotated[
        float | None, Field(ge=0, le=1, description="share of each task vector that TIES keeps; none: 0.2")
    ] = None

    @model_validator(mode="after")
    def _only_ties_trims(self) -> Consensus:
        if self.multi_task == "sum" and self.density is not None:
            raise ValueError("density is what 'ties' keeps: leave it out with multi_task 'sum'")
        return self

    @property
    def on(self) -> str:
        """Deltas."""
        return "deltas"

    @property
    def threshold(self) -> Threshold:
        """The trim of TIES as a statistic."""
        density = DENSITY if self.density is None else self.density
        return Threshold(density=density, count="published" if self.multi_task == "ties_published" else "at_least")

    def statistics(self) -> Mapping[str, Statistic]:
        """Nothing for the sum; for TIES each expert's threshold, and the majority sign where it decides something."""
        if self.multi_task == "sum":
            return {}
        majority = {"majority": SignMajority(threshold=self.threshold)} if self.multi_task == "ties_published" else {}
        return {"threshold": self.threshold, **majority}

    def validate_count(self, count: int) -> None:
        """One λ, or one per expert."""
        check_coefficients("mask_scale", self.mask_scale, count)

    def bound(self, order: Sequence[int]) -> Consensus:
        """Each λ_t moved along with its expert."""
        return self.model_copy(update={"mask_scale": reordered(self.mask_scale, order)})

    def arguments(self, block: Block, statistics: Statistics) -> dict[str, Any]:
        """For TIES where each expert is cut, and the sign that stands where the trimmed values cancel exactly."""
        if self.multi_task == "sum":
            return {}
        zero = float(statistics["majority"][0].numbers["sign"]) or -1.0 if "majority" in statistics else None
        return {"trims": trims(self.threshold, block, statistics), "zero": zero}

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], **arguments: Any) -> Tensor:
        """θ_0 + α τ_m where at least k masks agree, θ_0 elsewhere."""
        assert base is not None
        together = folded_sum(experts)
        if self.multi_task != "sum":
            deltas = trimmed_deltas(experts, arguments["trims"])
            together = folded_sum(agreeing(deltas, elected_sign(deltas, arguments["zero"])))
        masks = [
            torch.where(delta.abs() > (together - delta).abs() * scale, 1.0, 0.0)
            for delta, scale in zip(experts, spread(self.mask_scale, len(experts)), strict=True)
        ]
        return base + torch.where(folded_sum(masks) >= self.minimum_tasks, together, 0.0) * self.scale
