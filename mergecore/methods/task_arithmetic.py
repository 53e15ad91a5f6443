"""Task arithmetic: θ = θ_0 + λ Σ_t τ_t (Ilharco et al. 2023, §2); with a drop, DARE (Yu et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.trims import RandomDrop, added, dropped
from mergecore.arithmetic.weights import AGGREGATE, Aggregate, strength, total
from mergecore.plugins.block import Block
from mergecore.plugins.by_layer import Scale
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import DeltaMethod
from mergecore.plugins.per_expert import check_each
from mergecore.plugins.statistic import Statistic, Statistics
from mergecore.plugins.table import Weights, bound_weights, check_count
from mergecore.statistics.dropped_norms import DropArguments, drawn_for, drop_statistics


class TaskArithmetic(DeltaMethod[DropArguments]):
    """Add the task vectors to the base, each times a factor. A negative factor makes the model forget a task.

    With `weights` it does any arithmetic: `[1, 1, −1]` on experts C, B, A is the analogy C + (B − A).
    """

    name: ClassVar[str] = "task_arithmetic"
    paper: ClassVar[str] = (
        "Ilharco et al. 2023, Editing models with task arithmetic, arXiv:2212.04089; drop: Yu et al. "
        "2024, Language models are super Mario, arXiv:2311.03099"
    )
    published: ClassVar[tuple[str, ...]] = (
        "the authors' code, with integer buffers copied",
        "with `weights` mergekit's `task_arithmetic`; its `normalize: true` is `aggregate: mean`, or "
        "`signed_mean` where a weight is negative",
        "`drop: {rescale: l1}` its `dare_linear`, of other random masks",
        "`scale: {first: 0.3, last: 1.0}` the authors' code of LiNeS (Wang et al. 2024, 2410.17146), α 0.3, β 0.7",
    )

    scale: Annotated[Scale, Field(description="λ, the factor of the summed task vectors; 1/T gives the average")]
    weights: Annotated[
        Weights | None,
        Field(
            description="one factor per expert, in the order of the recipe, negative to forget, or a table of them "
            "(docs/learned.md); none: 1 each"
        ),
    ] = None
    aggregate: Annotated[
        Aggregate, Field(description=f"the sum of the weighted task vectors, or a mean; {AGGREGATE}")
    ] = "sum"
    drop: Annotated[RandomDrop | None, Field(description="random drop of changes before the sum (DARE)")] = None

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[
                {"scale": 0.7},
                {"scale": 1.0, "weights": [0.5, -0.25, 1.5]},
                {"scale": 0.7, "weights": [0.5, -0.25, 1.5], "aggregate": "mean"},
                {"scale": -0.3},
                {"scale": 0.5, "drop": {"kind": "random", "rate": 0.75, "seed": 11}},
                {"scale": 1.0, "drop": {"kind": "random", "rate": 0.4, "rescale": "l1", "seed": 3}},
                {"scale": {"first": 0.25, "last": 1.0}},
                {"scale": 1.0, "weights": {"groups": {"by": "model"}, "rows": {"all": [0.5, -0.25, 1.5]}}},
            ],
            others=[
                {
                    "scale": 0.7,
                    "weights": [1, -0.3, 1.6],
                    "drop": {"kind": "random", "rate": [0.4, 0.1, 0.6], "rescale": "l1", "seed": 3},
                },
                {"scale": 0.7, "weights": [1, 0.3, 1.6], "aggregate": "mean"},
                {"scale": -0.3, "drop": {"kind": "random", "rate": 0.4, "rescale": "inverse", "seed": 3}},
            ],
        )

    def revision(self, count: int) -> int:
        weights = self.weights if isinstance(self.weights, tuple) else (1.0,)  # a table is newer than its versions
        divided = self.aggregate != "sum" and min(weights) < 0
        return self.version + (divided or self.scale == 0 or not any(weights))

    @property
    def needs_ids(self) -> bool:
        return self.drop is not None

    @property
    def idempotent(self) -> bool:
        return False

    def statistics(self) -> Mapping[str, Statistic]:
        return drop_statistics(self.drop)

    def validate_count(self, count: int) -> None:
        check_count("weights", self.weights, count)
        check_each("drop.rate", self.drop and self.drop.rate, count)

    def bound(self, order: Sequence[int]) -> TaskArithmetic:
        drop = self.drop and self.drop.bound(order)
        return self.model_copy(update={"weights": bound_weights(self.weights, order), "drop": drop})

    def arguments(self, block: Block, statistics: Statistics) -> DropArguments:
        return DropArguments(drawn_for(self.drop, block, statistics))

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: DropArguments) -> Tensor:
        """Return θ_0 + λ Σ w_t τ_t, summed in the experts' order; of a mean, divided by Σ |w_t|."""
        together = total(dropped(deltas, arguments.drawn), self.weights, self.aggregate)
        return added(base, together, strength(self.scale, self.weights))
