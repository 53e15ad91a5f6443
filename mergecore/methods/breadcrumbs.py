"""Model Breadcrumbs: task vectors without their largest and their smallest changes, summed (Davari & Belilovsky
2024)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import floor
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mergecore.arithmetic.order_statistics import largest
from mergecore.arithmetic.trims import Shares, absolute_sum, added
from mergecore.arithmetic.weights import AGGREGATE, Aggregate, joined, strength
from mergecore.plugins.block import Per
from mergecore.plugins.by_layer import Scale
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import DeltaMethod, NoArguments
from mergecore.plugins.per_expert import check_each, each, moved


class Breadcrumbs(DeltaMethod[NoArguments]):
    """Remove the largest and the smallest changes of each task vector, and add up the rest: θ_0 + α Σ_t m_t ⊙ τ_t.

    Of the n magnitudes of a tensor the ⌊γn⌋ largest are removed. The next ⌊βn⌋ are kept. All others are removed. Counts
    are exact. Of equal magnitudes the first one ranks higher. A small tensor with ⌊γn⌋ = 0 loses no outlier. A tensor
    without axes is kept whole, as in the authors' code.
    """

    name: ClassVar[str] = "breadcrumbs"
    paper: ClassVar[str] = (
        "Davari & Belilovsky 2024, Model Breadcrumbs: scaling multi-task model merging with sparse masks, "
        "arXiv:2312.06795"
    )
    published: ClassVar[tuple[str, ...]] = (
        "`scope: row` the authors' code",
        "mergekit's `breadcrumbs`, of shares that add up to 1 at most; `crowded: fewer` also of others",
        "with `elect: mass` its `breadcrumbs_ties`",
    )
    per: ClassVar[Per] = Per.TENSOR

    scale: Annotated[Scale, Field(description="α, the factor of the summed task vectors")]
    density: Annotated[
        Shares, Field(description=("β, the share that is kept after the outliers; or one share per expert"))
    ] = 0.2
    outliers: Annotated[
        Shares,
        Field(description=("γ, the share of the largest changes that is removed; or one share per expert")),
    ] = 0.1
    crowded: Annotated[
        Literal["refuse", "fewer"],
        Field(
            description=(
                "what happens when both shares add up to more than 1: 'refuse', an error; 'fewer', fewer "
                "outliers are removed (mergekit)"
            )
        ),
    ] = "refuse"
    rescale: Annotated[
        Literal["none", "l1"],
        Field(
            description=("'none' leaves what is kept as it is; 'l1' scales it so that each tensor keeps its l1 norm")
        ),
    ] = "none"
    weights: Annotated[
        tuple[float, ...] | None, Field(description="one factor per expert, in the order of the recipe; none: 1 each")
    ] = None
    elect: Annotated[
        Literal["none", "mass"],
        Field(
            description=("'none' joins all changes; 'mass' joins only those with the sign of the sum (0 counts as +)")
        ),
    ] = "none"
    aggregate: Annotated[Aggregate, Field(description=f"the sum of what is joined, or a mean; {AGGREGATE}")] = "sum"
    scope: Annotated[
        Literal["tensor", "row"],
        Field(
            description=(
                "where magnitudes are ranked: 'tensor', within each tensor (the paper, mergekit); 'row', "
                "along its last axis (the authors' code)"
            )
        ),
    ] = "tensor"

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[{"scale": 0.4}, {"scale": 0.4, "density": 0.5, "outliers": 0.25, "scope": "row"}],
            others=[
                {"scale": -0.5, "density": 0.5, "outliers": 0.25, "scope": "row"},
                {
                    "scale": 1,
                    "density": [0.5, 0.9, 0.2],
                    "outliers": [0.1, 0.2, 0],
                    "crowded": "fewer",
                    "weights": [1, -2, 3],
                    "elect": "mass",
                    "aggregate": "mean",
                    "rescale": "l1",
                },
            ],
        )

    @model_validator(mode="after")
    def _shares_fit(self) -> Breadcrumbs:
        count = max(len(share) if isinstance(share, tuple) else 1 for share in (self.density, self.outliers))
        pairs = zip(each(self.density, count), each(self.outliers, count), strict=False)
        if self.crowded == "refuse" and any(Fraction(str(kept)) + Fraction(str(gone)) > 1 for kept, gone in pairs):
            raise ValueError("density and outliers add up to more than 1: what is removed cannot be kept")
        return self

    def validate_count(self, count: int) -> None:
        for name in ("density", "outliers", "weights"):
            check_each(name, getattr(self, name), count)

    def bound(self, order: Sequence[int]) -> Breadcrumbs:
        names = ("density", "outliers", "weights")
        return self.model_copy(update={name: moved(getattr(self, name), order) for name in names})

    def revision(self, count: int) -> int:
        return self.version + (self.weights is not None or self.scale == 0)

    @property
    def idempotent(self) -> bool:
        return False

    def masked(self, delta: Tensor, expert: int = 0) -> Tensor:
        """Return the task vector of one tensor, in its shape, with both tails at 0. expert: its position."""
        if delta.ndim == 0 or delta.numel() == 0:
            return delta
        rows = delta.abs().reshape(-1, delta.shape[-1] if self.scope == "row" else delta.numel())
        density, outliers = (each(share, expert + 1)[expert] for share in (self.density, self.outliers))
        kept = floor(Fraction(str(density)) * rows.shape[1])
        first = min(floor(Fraction(str(outliers)) * rows.shape[1]), rows.shape[1] - kept)
        keep = largest(rows, first + kept) & ~largest(rows, first)
        masked = torch.where(keep.view(delta.shape), delta, 0.0)
        left = absolute_sum(masked) if self.rescale == "l1" else 0.0
        return masked * (absolute_sum(delta) / left) if left else masked

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: NoArguments) -> Tensor:
        """Return θ_0 + α Σ_t of the masked τ_t, summed in the experts' order."""
        masked = [self.masked(delta, expert) for expert, delta in enumerate(deltas)]
        together = joined(masked, self.weights, self.elect, self.aggregate)
        return added(base, together, strength(self.scale, self.weights))
