"""Spherical linear interpolation between two models, tensor by tensor (Shoemake 1985; as mergekit's `slerp`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import acos, sin, sqrt
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import Shares, combined
from mergecore.errors import SpecError
from mergecore.plugins.block import Block
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import WeightMethod
from mergecore.plugins.per_expert import experts_given
from mergecore.plugins.statistic import Statistic, Statistics
from mergecore.statistics.products import Products, gram_of


class Slerp(WeightMethod[Shares]):
    """Go along the arc from one model to the other. The arc lies between the directions of their tensors."""

    name: ClassVar[str] = "slerp"
    paper: ClassVar[str] = "Shoemake 1985, Animating rotation with quaternion curves"
    published: ClassVar[tuple[str, ...]] = ("`start: base` mergekit's `slerp`",)
    version: ClassVar[int] = 2
    ordered: ClassVar[bool] = True

    t: Annotated[
        float,
        Field(description="where on the arc: 0 is the first model, 1 the second; beyond them it goes on along the arc"),
    ]
    start: Annotated[
        Literal["expert", "base"],
        Field(
            description=(
                "where the arc begins: 'expert', at the first of two experts; 'base', at the base, and it "
                "goes to one expert"
            )
        ),
    ] = "expert"
    colinear: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description=(
                "above this |cosine| the straight line is taken in place of the arc; 1: only where the "
                "arc has no length"
            ),
        ),
    ] = 0.9995

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[{"t": 0.3}],
            others=[{"t": 0.6, "start": "base", "colinear": 1}],
        )

    @property
    def needs_base(self) -> bool:
        return self.start == "base"

    @property
    def idempotent(self) -> bool:
        return self.start == "expert"

    def validate_count(self, count: int) -> None:
        wanted = 1 if self.needs_base else 2
        if count != wanted:
            said = "the base and one expert" if self.needs_base else "two experts"
            raise SpecError(f"slerp goes between {said}, {experts_given(count)}; use karcher for more than two")

    def statistics(self) -> Mapping[str, Statistic]:
        return {"products": Products(of="base and weights" if self.needs_base else "weights")}

    def arguments(self, block: Block, statistics: Statistics) -> Shares:
        return Shares(self._shares(gram_of(block.name, 2, statistics)))

    def merge(self, weights: Sequence[Tensor], arguments: Shares) -> Tensor:
        """Return (sin((1−t)Ω) a + sin(tΩ) b) / sin Ω, where Ω is the angle between a and b."""
        return combined(arguments.shares, weights)

    def _shares(self, products: Tensor) -> tuple[float, float]:
        """Return how much of either model, from their inner products (2, 2)."""
        length = sqrt(float(products[0, 0])) * sqrt(float(products[1, 1]))
        # A tensor of zeros has no direction, and opposite ones have no shortest arc: both take the straight line.
        if length == 0:
            return 1 - self.t, self.t
        cosine = max(-1.0, min(1.0, float(products[0, 1]) / length))
        angle = acos(cosine)
        if abs(cosine) > self.colinear or sin(angle) < 1e-7:
            return 1 - self.t, self.t
        return sin((1 - self.t) * angle) / sin(angle), sin(self.t * angle) / sin(angle)
