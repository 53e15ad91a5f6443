"""AdaMerging: every task vector times coefficients that were learned without labels (Yang et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from mergecore.plugins.any_statistic import AnyStatistic
from mergecore.plugins.block import Block
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import DeltaMethod
from mergecore.plugins.statistic import Statistics
from mergecore.statistics.coefficients import Coefficients, Selected, composed, selected


@dataclass(frozen=True)
class AdaMergingArguments:
    """coefficients: λ of each expert. how: how its task vectors are trimmed; None: not at all."""

    coefficients: Sequence[float]
    how: Selected | None


class AdaMerging(DeltaMethod[AdaMergingArguments]):
    """Learn a factor for every task vector and tensor, so that the merged model is sure of its answers.

    The factors are those with the least entropy on unlabelled inputs of the experts' tasks. The table that was learned
    stands in the record and on the card of the model; as the `weights` of `task_arithmetic` with scale 1 it makes the
    same model without data (but for `density`).
    """

    name: ClassVar[str] = "adamerging"
    ordered: ClassVar[bool] = True
    paper: ClassVar[str] = (
        "Yang et al. 2024, AdaMerging: adaptive model merging for multi-task learning, arXiv:2310.02575"
    )
    published: ClassVar[tuple[str, ...]] = (
        "`coefficients: {inputs: test}` the authors' code, layer-wise; batches are drawn by a hash",
        "`coefficients: {inputs: test, groups: {by: model}}` task-wise; with `density: 0.2` AdaMerging++",
    )

    coefficients: Annotated[Coefficients, Field(description="how the coefficients are learned")] = Coefficients()

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[{}, {"coefficients": {"groups": {"by": "model"}, "density": 0.4}}],
            others=[{"coefficients": {"groups": {"by": "layers", "parts": True}, "clamp": False}}],
        )

    @property
    def idempotent(self) -> bool:
        return False

    def statistics(self) -> Mapping[str, AnyStatistic]:
        return {"coefficients": self.coefficients, **self.coefficients.statistics()}

    def arguments(self, block: Block, statistics: Statistics) -> AdaMergingArguments:
        rows = statistics["coefficients"][0].numbers["table"]["rows"]
        row = rows[self.coefficients.groups.of(block.name)]
        return AdaMergingArguments(tuple(row), self.coefficients.how(block, statistics))

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: AdaMergingArguments) -> Tensor:
        """Return θ_0 + Σ λ_t τ_t with the learned λ_t of the tensor."""
        return composed(base, selected(deltas, arguments.how), arguments.coefficients)
