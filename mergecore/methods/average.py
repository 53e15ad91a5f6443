"""Averaging: θ = Σ w_t θ_t / Σ w_t. Model soups (Wortsman et al. 2022, §2); with a drop, DARE before an average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.series import Series
from mergecore.arithmetic.trims import Drawn, RandomDrop, divided, dropped, folded_sum
from mergecore.arithmetic.weights import weighted
from mergecore.errors import SpecError
from mergecore.plugins.block import Block
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import Method, On
from mergecore.plugins.per_expert import check_each, each, moved
from mergecore.plugins.statistic import Statistic, Statistics
from mergecore.statistics.dropped_norms import drawn_for, drop_statistics


@dataclass(frozen=True)
class AverageArguments:
    """drawn: what the drop draws; None: it drops nothing. divisor: the sum of the weights."""

    drawn: Drawn | None
    divisor: float


class Average(Method[AverageArguments]):
    """Take the weighted mean of the experts' weights. The base is read only where a drop needs task vectors.

    The mean is formed in float64 and rounded once: where all experts are equal, it is their value to the last bit. Some
    weights may be negative: the mean then lies beyond the experts. With aggregate 'sum' it is the weighted sum itself:
    one expert with weight 0.5 is that expert, halved.

    Of checkpoints of one training run, `series` gives the weights. List them from the oldest to the newest.
    """

    name: ClassVar[str] = "average"
    paper: ClassVar[str] = (
        "Wortsman et al. 2022, Model soups: averaging weights of multiple fine-tuned models improves "
        "accuracy without increasing inference time, arXiv:2203.05482; drop: Yu et al. 2024, "
        "arXiv:2311.03099; series: Kaddour 2022 (LAWA), arXiv:2209.14981; Li et al. 2025 (PMA), arXiv:2505.12082; Tian "
        "et al. 2025 (WSM), arXiv:2507.17634"
    )
    published: ClassVar[tuple[str, ...]] = (
        "mergekit's `linear` (float32 sums instead of the checkpoint's dtype)",
        "`aggregate: sum` its `normalize: false`",
        "`series: {kind: decay}` WSM's theorem, read at points of our choice; no code of LAWA, PMA or WSM was compared",
    )

    weights: Annotated[
        tuple[float, ...] | None,
        Field(description="one weight per expert, in the order of the recipe; divided by their sum; none: uniform"),
    ] = None
    aggregate: Annotated[
        Literal["mean", "sum"],
        Field(description=("'mean' divides by the sum of the weights; 'sum' takes the weights as they are")),
    ] = "mean"
    drop: Annotated[RandomDrop | None, Field(description="random drop of changes before the mean (DARE)")] = None
    series: Annotated[
        Series | None,
        Field(description="weights of checkpoints of one training run, the oldest first, in place of `weights`"),
    ] = None

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[
                {},
                {"weights": [3, 1, 2]},
                {"weights": [0.1, 0.2, 0.4]},
                {"weights": [0.5, -0.25, 1.5], "aggregate": "sum"},
                {"drop": {"kind": "random", "rate": 0.4, "rescale": "l1", "seed": 3}},
                {"drop": {"kind": "random", "rate": 0.75, "seed": 11}},
                {"series": {"kind": "ema", "share": 0.25}},
                {"series": {"kind": "decay", "shape": "sqrt"}},
            ],
            others=[
                {"series": {"kind": "rising"}},
                {"series": {"kind": "uniform"}},
                {"series": {"kind": "decay", "shape": "cosine"}, "aggregate": "sum"},
                {
                    "weights": [3, -1, 2],
                    "drop": {"kind": "random", "rate": [0.4, 0.1, 0.6], "rescale": "l1", "seed": 3},
                },
            ],
        )

    def parameters(self) -> dict[str, Any]:
        """Return the fields as plain JSON. A series is left out where there is none: keys are what they were before."""
        return {key: value for key, value in super().parameters().items() if key != "series" or value is not None}

    @property
    def on(self) -> On:
        return "deltas" if self.drops else "weights"

    def revision(self, count: int) -> int:
        if self.drops:
            return self.version + (self.aggregate == "sum")
        # One expert, and the plain mean of two, were rounded once before.
        return self.version + (self.aggregate == "mean" and (count > 2 or self.weights is not None))

    @property
    def drops(self) -> bool:
        """Whether anything is dropped: with a rate of 0 it is the average without a drop, bit for bit."""
        return self.drop is not None and any(each(self.drop.rate, 1))

    @property
    def drawn_by(self) -> frozenset[str]:
        return super().drawn_by if self.drops else frozenset()

    @property
    def needs_ids(self) -> bool:
        return self.drops

    @property
    def idempotent(self) -> bool:
        return not self.drops and self.aggregate == "mean"

    def statistics(self) -> Mapping[str, Statistic]:
        return drop_statistics(self.drop if self.drops else None)

    def validate_count(self, count: int) -> None:
        if self.series is not None and self.weights is not None:
            raise SpecError("series: gives the weights of the experts, and so does `weights`; leave one of them out")
        check_each("weights", self.weights, count)
        check_each("drop.rate", self.drop and self.drop.rate, count)
        if self.weights is not None and self.aggregate == "mean" and abs(fsum(self.weights)) < 1e-8:
            advice = (
                "all are 0; give at least one expert another" if not any(self.weights) else "they add up to 0; change"
            )
            raise SpecError(f"weights: {advice} weight, or set aggregate to 'sum', which does not divide by them")

    def bound(self, order: Sequence[int]) -> Average:
        weights = self.weights if self.series is None else self.series.weights(len(order))
        drop = self.drop and self.drop.bound(order)
        return self.model_copy(update={"weights": moved(weights, order), "drop": drop, "series": None})

    def arguments(self, block: Block, statistics: Statistics) -> AverageArguments:
        drawn = drawn_for(self.drop, block, statistics) if self.drops else None
        return AverageArguments(drawn, float(len(block.ids)) if self.weights is None else fsum(self.weights))

    def merge_models(self, models: Sequence[Tensor], arguments: AverageArguments) -> Tensor:
        """Return Σ w_t θ_t, divided by Σ w_t for a mean; with a drop of θ_0 plus the dropped τ_t."""
        if arguments.drawn is None:
            if self.aggregate == "sum":
                return folded_sum(weighted(models, self.weights))
            return divided(
                folded_sum(weighted([model.double() for model in models], self.weights)), arguments.divisor
            ).float()
        base, deltas = models[0], dropped(models[1:], arguments.drawn)
        if self.aggregate == "mean":
            return base + divided(folded_sum(weighted(deltas, self.weights)), arguments.divisor)
        change = folded_sum(weighted([delta.double() for delta in deltas], self.weights))
        return (base.double() * arguments.divisor + change).float()
