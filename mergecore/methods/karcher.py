"""Karcher mean: the centre of the experts' directions on the sphere, per tensor (Karcher 1977; as mergekit's
`karcher`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import cos, pi, sin
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import Shares, combined
from mergecore.plugins.block import Block
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import WeightMethod
from mergecore.plugins.statistic import Statistic, Statistics
from mergecore.statistics.products import Products, gram_of


class Karcher(WeightMethod[Shares]):
    """Take the point on the sphere with the least sum of squared arc lengths to the experts. Its norm is the mean of
    their norms.
    """

    name: ClassVar[str] = "karcher"
    paper: ClassVar[str] = "Karcher 1977, Riemannian center of mass and mollifier smoothing"
    published: ClassVar[tuple[str, ...]] = ("mergekit's `karcher`, without its absolute guards",)
    version: ClassVar[int] = 2

    iterations: Annotated[
        int, Field(ge=0, description="number of steps at most; 0 gives the mean of the directions")
    ] = 10
    tolerance: Annotated[
        float, Field(ge=1e-8, lt=1, description=("the search stops when a step is shorter than this, in radians"))
    ] = 1e-5

    @classmethod
    def examples(cls) -> Examples:
        return Examples(others=[{"iterations": 50, "tolerance": 1e-08}])

    def statistics(self) -> Mapping[str, Statistic]:
        return {"products": Products()}

    def arguments(self, block: Block, statistics: Statistics) -> Shares:
        """Return how much of each expert.

        u lies in the experts' span, and a step needs only their inner products. So the iteration runs on the T
        coefficients of u.
        """
        count = len(block.ids)
        products = gram_of(block.name, count, statistics)
        norms = products.diagonal().sqrt()
        # A tensor of zeros has no direction; it still counts in the mean of the norms.
        present = (norms > 0).nonzero().reshape(-1)
        coefficients = torch.zeros(count, dtype=torch.float64)
        if len(present):
            lengths = norms[present]
            cosines = products[present][:, present] / lengths[:, None] / lengths
            coefficients[present] = self._centre(cosines) / lengths * norms.mean()
        return Shares(coefficients.tolist())

    def merge(self, weights: Sequence[Tensor], arguments: Shares) -> Tensor:
        """Return mean norm × u, with u ← exp_u(mean of log_u(θ_t / ‖θ_t‖))."""
        return combined(arguments.shares, weights)

    def _centre(self, cosines: Tensor) -> Tensor:
        """Return the coefficients of u over the unit vectors, whose inner products are `cosines`."""
        share = 1.0 / len(cosines)
        mean = torch.full((len(cosines),), share, dtype=torch.float64)
        length = _length(mean, cosines)
        if length < self.tolerance:  # directions that cancel have no middle: start from the first
            centre = torch.zeros_like(mean)
            centre[0] = 1.0
        else:
            centre = mean / length
        for _ in range(self.iterations):
            along = (cosines @ centre).clamp(-1.0, 1.0)
            angles = along.acos()
            # log_u(x) = Ω / sin Ω · (x − cos Ω u). At Ω = 0 it is 0; opposite to u every direction is as short as any.
            usable = (angles >= self.tolerance) & (angles <= pi - self.tolerance)
            stretch = torch.where(usable, angles / angles.sin(), 0.0) * share
            step = stretch - (stretch * along).sum() * centre
            length = _length(step, cosines)
            if length < self.tolerance:
                break
            centre = cos(length) * centre + sin(length) / length * step
            centre = centre / _length(centre, cosines)
        return centre


def _length(coefficients: Tensor, products: Tensor) -> float:
    """Return the norm of the combination of vectors that have these inner products."""
    return float((coefficients @ products @ coefficients).clamp(min=0.0).sqrt())
