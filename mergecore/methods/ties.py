"""TIES-Merging: trim, elect sign, disjoint merge (Yadav et al. 2023, §3); with a drop, DARE-TIES (Yu et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.trims import Elect, RandomDrop, Shares, added, agreeing, largest_magnitude
from mergecore.arithmetic.weights import AGGREGATE, elected, joined_agreeing, strength, weighted
from mergecore.errors import SpecError
from mergecore.plugins.block import Block
from mergecore.plugins.by_layer import Scale
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import DeltaMethod
from mergecore.plugins.per_expert import check_each, each, moved
from mergecore.plugins.statistic import Statistic, Statistics
from mergecore.statistics.sign_majority import SignMajority, majority_sign
from mergecore.statistics.threshold import Count, Threshold, Trims, trimmed_deltas, trims
from mergecore.statistics.trimmed_norms import shares_of


@dataclass(frozen=True)
class TiesArguments:
    """trims: where each expert is cut. zero: the sign where the trimmed values cancel exactly; None: there is none.
    shares: for the elections by shares, 1/‖τ̂_t‖² of each expert."""

    trims: Trims
    zero: float | None
    shares: Sequence[float] | None


class Ties(DeltaMethod[TiesArguments]):
    """Keep the largest changes of each expert, elect a sign per coordinate, and average the changes with that sign."""

    name: ClassVar[str] = "ties"
    paper: ClassVar[str] = (
        "Yadav et al. 2023, TIES-Merging: resolving interference when merging models, arXiv:2306.01708"
    )
    published: ClassVar[tuple[str, ...]] = (
        "`count: published` the authors' code, with `aggregate` as its mean, sum or max and `elect` as its "
        "`resolve_method`",
        "`scope: tensor, count: exact, least: 1, zero_sign: positive` mergekit's `ties`; where a weight is "
        "negative, with `aggregate: signed_mean`",
        "with `drop: {rescale: l1}` and density 1 its `dare_ties`, of other random masks",
    )

    density: Annotated[
        Shares,
        Field(description="share of each task vector that is kept, or one share per expert in the order of the recipe"),
    ] = 0.2
    scale: Annotated[Scale, Field(description="λ, the factor of the joined task vector")] = 1.0
    weights: Annotated[
        tuple[float, ...] | None,
        Field(description="one factor per expert for its trimmed changes, before signs are elected; none: 1 each"),
    ] = None
    scope: Annotated[
        Literal["global", "tensor"],
        Field(
            description=(
                "where magnitudes are ranked: 'global', over the whole selection (the paper); 'tensor', "
                "within each tensor (mergekit)"
            )
        ),
    ] = "global"
    elect: Annotated[
        Elect,
        Field(
            description=(
                "how the sign of a coordinate is elected: 'mass', the sign of the sum (the paper). The "
                "other two divide each squared change by the expert's squared norm: 'normmass' adds these "
                "shares up with their signs, 'normfrac' takes the sign of the largest"
            )
        ),
    ] = "mass"
    aggregate: Annotated[
        Literal["mean", "sum", "max", "signed_mean"],
        Field(description=f"how the values that agree with the elected sign are joined; {AGGREGATE}"),
    ] = "mean"
    count: Annotated[
        Count,
        Field(
            description=(
                "which of the magnitudes equal to the threshold are kept: 'at_least', all of them; "
                "'exact', the first by tensor name and index; 'published', as the authors' code"
            )
        ),
    ] = "at_least"
    least: Annotated[
        int,
        Field(
            ge=0,
            description=(
                "number of elements that are kept of each ranking in any case (mergekit keeps 1 of each tensor)"
            ),
        ),
    ] = 0
    zero_sign: Annotated[
        Literal["drop", "positive", "majority"] | None,
        Field(
            description=(
                "what happens where trimmed values cancel exactly: 'drop' changes nothing, 'positive' "
                "takes the positive values, 'majority' the sign that most of the model has; none: 'drop', "
                "or 'majority' with count 'published'"
            )
        ),
    ] = None
    drop: Annotated[RandomDrop | None, Field(description="random drop of changes before the trim (DARE-TIES)")] = None

    @classmethod
    def examples(cls) -> Examples:
        joined = product(("global", "tensor"), ("mean", "sum", "max"), ("at_least", "exact", "published"))
        return Examples(
            golden=[
                {},
                {"density": 0.5, "scale": 0.8, "scope": "tensor"},
                {"density": 0.3, "aggregate": "sum", "count": "exact"},
                {"density": 0.3, "aggregate": "max", "count": "published"},
                {"density": 0.7, "zero_sign": "positive"},
                {
                    "density": [0.2, 0.5, 0.7],
                    "weights": [0.5, -0.25, 1.5],
                    "least": 1,
                    "scope": "tensor",
                    "count": "exact",
                },
                {"density": 0.4, "zero_sign": "majority", "scope": "tensor", "count": "exact"},
                {"density": 0.5, "drop": {"kind": "random", "rate": 0.4, "rescale": "l1", "seed": 3}},
                {"density": 0.5, "drop": {"kind": "random", "rate": 0.75, "seed": 11}, "count": "exact"},
                {"density": 0.5, "elect": "normmass", "zero_sign": "majority"},
                {"density": 0.5, "elect": "normfrac", "scope": "tensor"},
            ],
            others=[
                *(
                    {"density": 0.3, "scale": 0.8, "scope": scope, "aggregate": aggregate, "count": count}
                    for scope, aggregate, count in joined
                ),
                {"density": [0.2, 0.5, 0.7], "weights": [1, -0.5, 2], "least": 1, "scope": "tensor", "count": "exact"},
                {
                    "density": [0.2, 0.5, 0.7],
                    "weights": [1, 0.5, 2],
                    "drop": {"kind": "random", "rate": [0.4, 0.1, 0.6], "rescale": "l1", "seed": 3},
                },
                {
                    "density": 0.5,
                    "drop": {"kind": "random", "rate": 0.4, "rescale": "l1", "seed": 3},
                    "count": "exact",
                    "zero_sign": "majority",
                },
                {"density": 0.5, "elect": "normmass", "count": "published"},
                {
                    "density": 0.5,
                    "elect": "normfrac",
                    "drop": {"kind": "random", "rate": 0.4, "rescale": "l1", "seed": 3},
                },
            ],
        )

    def revision(self, count: int) -> int:
        return self.version + (self.weights is not None or self.scale == 0)

    @property
    def needs_ids(self) -> bool:
        return self.drop is not None

    @property
    def idempotent(self) -> bool:
        return False

    @property
    def threshold(self) -> Threshold:
        """The trim as a statistic."""
        return Threshold(density=self.density, ranked=self.scope, count=self.count, least=self.least, drop=self.drop)

    @property
    def by_majority(self) -> bool:
        """Whether exact cancellations take the merge-wide majority sign."""
        return self.zero_sign == "majority" or (self.zero_sign is None and self.count == "published")

    def statistics(self) -> Mapping[str, Statistic]:
        """Return each expert's threshold, and the majority sign where it decides something."""
        majority = SignMajority(threshold=self.threshold, elect=self.elect)
        return {**majority.statistics(), **({"majority": majority} if self.by_majority else {})}

    def validate_count(self, count: int) -> None:
        for name, values in (("density", self.density), ("weights", self.weights)):
            check_each(name, values, count)
        check_each("drop.rate", self.drop and self.drop.rate, count)
        if self.weights is not None and self.by_majority:
            raise SpecError(
                "ties: weights and a majority sign for exact cancellations cannot be combined; "
                "set zero_sign to 'drop' or 'positive'"
            )

    def bound(self, order: Sequence[int]) -> Ties:
        changes = {"density": moved(self.density, order), "weights": moved(self.weights, order)}
        return self.model_copy(update={**changes, "drop": self.drop and self.drop.bound(order)})

    def arguments(self, block: Block, statistics: Statistics) -> TiesArguments:
        shares = None
        if self.elect != "mass":
            weighed = zip(shares_of(statistics, len(block.ids)), each(self.weights or 1.0, len(block.ids)), strict=True)
            shares = [share / weight**2 if weight else 0.0 for share, weight in weighed]
        return TiesArguments(trims(self.threshold, block, statistics), self._zero(statistics), shares)

    def _zero(self, statistics: Statistics) -> float | None:
        if self.by_majority:
            return majority_sign(statistics)
        return 1.0 if self.zero_sign == "positive" else None

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: TiesArguments) -> Tensor:
        """Return θ_0 + λ · (mean, sum or largest of the τ̂_t that agree with the elected sign)."""
        trimmed = trimmed_deltas(deltas, arguments.trims)
        sign = elected(trimmed, self.weights, arguments.zero, self.elect, arguments.shares)
        return added(base, self._joined(trimmed, sign), strength(self.scale, self.weights))

    def _joined(self, deltas: Sequence[Tensor], sign: Tensor) -> Tensor:
        if self.aggregate == "max":
            return largest_magnitude(agreeing(weighted(deltas, self.weights), sign)) * sign
        return joined_agreeing(deltas, self.weights, sign, self.aggregate)
