"""Fisher-weighted averaging: θ = Σ c_t F_t θ_t / Σ c_t F_t, element by element (Matena & Raffel 2022, §3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum, sqrt
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.trims import divided, folded_sum
from mergecore.plugins.block import Beside, Block
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import Method
from mergecore.plugins.per_expert import check_weights, moved
from mergecore.plugins.statistic import DataStatistic, Statistic, Statistics
from mergecore.statistics.fisher import DiagonalFisher

LIFT = 2.0**64
"""Squared gradients reach down to the smallest float32 there is, where a product with a weight keeps no digit; a power
of two lifts them out of there and changes no bit of any other result."""


class Fisher(Method):
    """The mean of the experts' weights, each coordinate weighted by how sharply the expert's output depends on it."""

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
        float, Field(ge=0, description="smallest Fisher value, applied before the norm is divided out")
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

    @property
    def on(self) -> str:
        """Weights."""
        return "weights"

    def statistics(self) -> Mapping[str, Statistic | DataStatistic]:
        """Each expert's diagonal Fisher."""
        return {"fisher": self.fisher}

    def validate_count(self, count: int) -> None:
        """One weight per expert, not all zero."""
        check_weights(self.weights, count)

    def bound(self, order: Sequence[int]) -> Fisher:
        """Weights moved along with their experts."""
        return self if self.weights is None else self.model_copy(update={"weights": moved(self.weights, order)})

    def arguments(self, block: Block, statistics: Statistics) -> dict[str, Any]:
        """Each expert's Fisher beside the block, and its coefficient c_t / ‖F_t‖."""
        found = statistics["fisher"]
        norms = [sqrt(fsum(one.numbers["squared_norm"].values())) if self.normalize else 1.0 for one in found]
        weights = self.weights or (1.0,) * len(found)
        return {
            "fishers": [Beside(one.tensors, block.name) for one in found],
            "coefficients": [c / norm if norm > 0 else 0.0 for c, norm in zip(weights, norms, strict=True)],
            "weights": list(weights),
            "total": fsum(weights),
        }

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], **arguments: Any) -> Tensor:
        """The weighted mean; where every expert's weight is 0, the plain mean by `weights`."""
        importance = [
            fisher.clamp(min=self.floor) * coefficient * LIFT
            for fisher, coefficient in zip(arguments["fishers"], arguments["coefficients"], strict=True)
        ]
        total = folded_sum(importance)
        informed = folded_sum([share * expert for share, expert in zip(importance, experts, strict=True)])
        plain = folded_sum([expert * c for expert, c in zip(experts, arguments["weights"], strict=True)])
        return torch.where(total > 0, informed / total, divided(plain, arguments["total"]))
