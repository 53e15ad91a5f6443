"""Fisher-weighted averaging: θ = Σ c_t F_t θ_t / Σ c_t F_t, element by element (Matena & Raffel 2022, §3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum, sqrt
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.trims import divided, folded_sum
from mergecore.plugins.any_statistic import AnyStatistic
from mergecore.plugins.block import Block, read_beside
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import WeightMethod
from mergecore.plugins.per_expert import check_weights, moved
from mergecore.plugins.statistic import Statistics
from mergecore.statistics.fisher import DiagonalFisher

LIFT = 2.0**64
"""Squared gradients reach down to the smallest float32 there is, where a product with a weight keeps no digit; a power
of two lifts them out of there and changes no bit of any other result."""


@dataclass(frozen=True)
class FisherArguments:
    """Per expert its Fisher information F_t of each element, its coefficient c_t / ‖F_t‖, and c_t; `total` is Σ c_t."""

    fishers: Sequence[Tensor]
    coefficients: Sequence[float]
    weights: Sequence[float]
    total: float


class Fisher(WeightMethod[FisherArguments]):
    """Average the experts' weights. A coordinate of an expert counts as much as its Fisher information says: how much
    the expert's output depends on it.
    """

    name: ClassVar[str] = "fisher"
    paper: ClassVar[str] = "Matena & Raffel 2022, Merging models with Fisher-weighted averaging, arXiv:2111.09832"
    published: ClassVar[tuple[str, ...]] = ("the authors' code, of Fisher information that is estimated per item",)

    weights: Annotated[
        tuple[Annotated[float, Field(ge=0)], ...] | None,
        Field(description="c_t, one per expert in the order of the recipe; none: equal"),
    ] = None
    normalize: Annotated[
        bool, Field(description="divide each expert's Fisher by its l2 norm over the selection, as the authors do")
    ] = True
    floor: Annotated[
        float, Field(ge=0, description=("smallest Fisher value; it is applied before the division by the norm"))
    ] = 0.0
    fisher: Annotated[DiagonalFisher, Field(description="how the diagonal Fisher information is estimated")] = (
        DiagonalFisher()
    )

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[{}, {"weights": [1, 0, 2], "normalize": False, "floor": 0.0009765625}],
            others=[{"weights": [1, 0, 2], "normalize": False, "floor": 0.001}],
        )

    def statistics(self) -> Mapping[str, AnyStatistic]:
        return {"fisher": self.fisher}

    def validate_count(self, count: int) -> None:
        check_weights(self.weights, count)

    def bound(self, order: Sequence[int]) -> Fisher:
        return self if self.weights is None else self.model_copy(update={"weights": moved(self.weights, order)})

    def arguments(self, block: Block, statistics: Statistics) -> FisherArguments:
        fishers = statistics["fisher"]
        norms = [sqrt(fsum(f.numbers["squared_norm"].values())) if self.normalize else 1.0 for f in fishers]
        weights = self.weights or (1.0,) * len(fishers)
        return FisherArguments(
            fishers=[read_beside(fisher.tensors, block.name) for fisher in fishers],
            coefficients=[c / norm if norm > 0 else 0.0 for c, norm in zip(weights, norms, strict=True)],
            weights=weights,
            total=fsum(weights),
        )

    def merge(self, weights: Sequence[Tensor], arguments: FisherArguments) -> Tensor:
        """Return the weighted mean; where the Fisher information of all experts is 0, the plain mean by c_t."""
        importance = [
            fisher.clamp(min=self.floor) * coefficient * LIFT
            for fisher, coefficient in zip(arguments.fishers, arguments.coefficients, strict=True)
        ]
        total = folded_sum(importance)
        informed = folded_sum([share * expert for share, expert in zip(importance, weights, strict=True)])
        plain = folded_sum([expert * c for expert, c in zip(weights, arguments.weights, strict=True)])
        return torch.where(total > 0, informed / total, divided(plain, arguments.total))
