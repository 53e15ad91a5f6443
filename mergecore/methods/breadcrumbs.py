"""Model Breadcrumbs: task vectors without their largest and their smallest changes, summed (Davari & Belilovsky 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import floor
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mergecore.method import Method, Per
from mergecore.trims import folded_sum


class Breadcrumbs(Method):
    """θ_0 + α Σ_t of the masked τ_t: of n magnitudes the ⌊γn⌋ largest go, the ⌊βn⌋ next ones stay, the rest go.

    Counts are exact; of equal magnitudes the one that comes first ranks higher. A tensor so small that ⌊γn⌋ = 0 loses no
    outlier and keeps ⌊βn⌋ elements; a tensor without axes has nothing to rank and is kept, as in the authors' code.
    """

    name: ClassVar[str] = "breadcrumbs"
    paper: ClassVar[str] = (
        "Davari & Belilovsky 2024, Model Breadcrumbs: scaling multi-task model merging with sparse masks, "
        "arXiv:2312.06795"
    )
    published: ClassVar[tuple[str, ...]] = (
        "`scope: row` the authors' code",
        "mergekit's `breadcrumbs`, which empties a tensor whose outliers round to none",
    )
    per: ClassVar[Per] = Per.TENSOR
    idempotent: ClassVar[bool] = False

    scale: Annotated[float, Field(description="α, the factor of the summed task vectors")]
    density: Annotated[float, Field(ge=0, le=1, description="β, the share that is kept, below the outliers")] = 0.2
    outliers: Annotated[float, Field(ge=0, le=1, description="γ, the share of largest changes that is removed")] = 0.1
    scope: Annotated[
        Literal["tensor", "row"],
        Field(
            description="rank magnitudes within each tensor (the paper, mergekit) or along its last axis "
            "(the authors' code)"
        ),
    ] = "tensor"

    @model_validator(mode="after")
    def _shares_fit(self) -> Breadcrumbs:
        if Fraction(str(self.density)) + Fraction(str(self.outliers)) > 1:
            raise ValueError("density and outliers add up to more than 1: what is removed cannot be kept")
        return self

    @property
    def on(self) -> str:
        """Deltas."""
        return "deltas"

    def masked(self, delta: Tensor) -> Tensor:
        """The task vector of one tensor, in its shape, with both tails at 0."""
        if delta.ndim == 0 or delta.numel() == 0:
            return delta
        rows = delta.abs().reshape(-1, delta.shape[-1] if self.scope == "row" else delta.numel())
        first = floor(Fraction(str(self.outliers)) * rows.shape[1])
        last = first + floor(Fraction(str(self.density)) * rows.shape[1])
        order = rows.sort(dim=1, descending=True, stable=True).indices
        keep = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order[:, first:last], True)
        return torch.where(keep.view(delta.shape), delta, 0.0)

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], **arguments: Any) -> Tensor:
        """θ_0 + α Σ_t of the masked τ_t, formed left over the experts."""
        assert base is not None
        return base + folded_sum([self.masked(delta) for delta in experts]) * self.scale
