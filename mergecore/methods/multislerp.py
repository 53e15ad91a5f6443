"""Multi-SLERP: the weighted mean direction of many experts, at their mean length (Goddard 2024; as in mergekit)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import Shares, combined
from mergecore.errors import SpecError
from mergecore.plugins.block import Block
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import Method, On
from mergecore.plugins.per_expert import moved
from mergecore.plugins.statistic import Statistic, Statistics
from mergecore.statistics.products import Products, gram_of

PARALLEL = 1e-7
"""Directions whose weighted mean is shorter than this, relative to their weights, cancel."""


class Multislerp(Method[Shares]):
    """Take the weighted mean of the experts' directions, at their weighted mean length: the direction of Σ w_t
    θ_t/‖θ_t‖, times Σ w_t ‖θ_t‖.

    The published procedure then goes into the tangent space at that direction, and back. There the weighted sum of the
    experts' tangents is 0, so that step adds only rounding errors. It is left out. Where the directions cancel there is
    no mean direction, and the straight line Σ w_t θ_t is taken.
    """

    name: ClassVar[str] = "multislerp"
    paper: ClassVar[str] = "none; Goddard 2024, a note on barycentric interpolation on the sphere"
    version: ClassVar[int] = 2
    published: ClassVar[tuple[str, ...]] = (
        "mergekit's `multislerp` without a base",
        "`of: deltas` with one",
        "`divide: none` its `normalize_weights: false`",
    )

    weights: Annotated[
        tuple[float, ...] | None,
        Field(description="one weight per expert, in the order of the recipe; none: equal ones"),
    ] = None
    divide: Annotated[
        Literal["sum", "none"],
        Field(description=("'sum' divides the weights by their sum; 'none' takes them as they are")),
    ] = "sum"
    of: Annotated[
        Literal["weights", "deltas"],
        Field(description=("what is joined: 'weights', the experts' weights; 'deltas', their task vectors")),
    ] = "weights"

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[{}, {"weights": [3, 1, 2], "of": "deltas"}],
            others=[{"weights": [3, 1, -2], "divide": "none", "of": "deltas"}],
        )

    @property
    def on(self) -> On:
        return self.of

    @property
    def idempotent(self) -> bool:
        return self.divide == "sum"

    def validate_count(self, count: int) -> None:
        if self.weights is None:
            return
        if len(self.weights) != count:
            raise SpecError(f"weights: {len(self.weights)} given for {count} experts; give one per expert, or none")
        if self.divide == "sum" and sum(self.weights) == 0:
            raise SpecError("weights: they add up to 0 and cannot be divided by it; take `divide: none`")

    def bound(self, order: Sequence[int]) -> Multislerp:
        return self if self.weights is None else self.model_copy(update={"weights": moved(self.weights, order)})

    def statistics(self) -> Mapping[str, Statistic]:
        return {"products": Products(of=self.of)}

    def arguments(self, block: Block, statistics: Statistics) -> Shares:
        """Return how much of each expert; a single one is itself, whatever its weight."""
        count = len(block.ids)
        return Shares([1.0] if count == 1 else self._shares(gram_of(block.name, count, statistics)))

    def merge_models(self, models: Sequence[Tensor], arguments: Shares) -> Tensor:
        """Return (Σ w_t ‖θ_t‖) · m / ‖m‖ with m = Σ w_t θ_t/‖θ_t‖; of deltas likewise, on top of the base."""
        if self.of == "weights":
            return combined(arguments.shares, models)
        base, *deltas = models
        return combined([*arguments.shares, 1.0], [*deltas, base])

    def _shares(self, products: Tensor) -> list[float]:
        """Return how much of each expert, from their inner products (T, T): the result lies in their span."""
        weights = torch.tensor(self.weights or [1.0] * len(products), dtype=torch.float64)
        if self.divide == "sum":
            weights = weights / weights.sum()
        norms = products.diagonal().sqrt()
        units = torch.where(norms > 0, weights / norms, 0.0)
        length = sqrt(max(float(units @ products @ units), 0.0))
        if length <= PARALLEL * float(weights.abs().sum()):
            return weights.tolist()
        return (units * (float(weights @ norms) / length)).tolist()
