"""RAM, reinforced agent merging: shared changes averaged, an expert's own kept whole or boosted (Yuan et al. 2026)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from mergecore.arithmetic.trims import folded_sum
from mergecore.identity.numbers import Numbers
from mergecore.plugins.block import Block
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import DeltaMethod
from mergecore.plugins.statistic import Statistic, Statistics
from mergecore.statistics.overlap_counts import SHARED, UNIQUE, OverlapCounts


class Boost(Numbers):
    """RAM+: an expert's own changes times 1 + rate · min(shared / unique, most), for what averaging took from the
    shared.

    shared, unique: how many of its changed coordinates another expert changes too, and how many none does. Where an
    expert has none of its own there is nothing to boost.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    rate: Annotated[float, Field(ge=0, description="r, the factor of the ratio")] = 0.1
    most: Annotated[float, Field(ge=0, description="α, the largest ratio that counts")] = 0.2
    scope: Annotated[
        Literal["global", "tensor"],
        Field(
            description=(
                "where changes are counted: 'global', over the whole selection (the paper); 'tensor', "
                "within each tensor (mergekit's `ramplus_tl`)"
            )
        ),
    ] = "global"

    def factors(self, shared: Sequence[int], unique: Sequence[int]) -> list[float]:
        """Return per expert what its own changes are multiplied by."""
        return [
            1.0 + self.rate * min(common / own, self.most) if own else 1.0
            for common, own in zip(shared, unique, strict=True)
        ]


@dataclass(frozen=True)
class RamArguments:
    """factors: for RAM+, what each expert's own changes are multiplied by."""

    factors: Sequence[float] | None


class Ram(DeltaMethod[RamArguments]):
    """Average a coordinate over those experts that change it: θ_0 + Σ τ_t / n. A change of one expert alone is kept
    whole.

    Reinforcement learning changes few weights, and other weights for other tasks. A mean over all experts would make
    each change small. With `boost` the method is RAM+.
    """

    name: ClassVar[str] = "ram"
    paper: ClassVar[str] = "Yuan et al. 2026, Behavior knowledge merge in reinforced agentic models, arXiv:2601.13572"
    published: ClassVar[tuple[str, ...]] = (
        "mergekit's `ram`",
        "`boost: {scope: tensor}` mergekit's `ramplus_tl`",
    )

    epsilon: Annotated[float, Field(ge=0, description="a change of at most this size counts as no change")] = 1e-5
    boost: Annotated[Boost | None, Field(description="RAM+: changes of one expert alone are made larger")] = None

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[
                {},
                {"epsilon": 0.03125, "boost": {"scope": "tensor"}},
                {"epsilon": 0.03125, "boost": {"most": 4, "rate": 0.5}},
            ],
            others=[
                {"epsilon": 0.05, "boost": {"rate": 0.5, "most": 3, "scope": "global"}},
                {"epsilon": 0.1, "boost": {"rate": 0.5, "most": 3, "scope": "tensor"}},
            ],
        )

    @property
    def idempotent(self) -> bool:
        return False

    def statistics(self) -> Mapping[str, Statistic]:
        return {} if self.boost is None else {"overlap": OverlapCounts(epsilon=self.epsilon)}

    def arguments(self, block: Block, statistics: Statistics) -> RamArguments:
        if self.boost is None:
            return RamArguments(None)
        overlap = statistics["overlap"][0]
        if self.boost.scope == "global":
            return RamArguments(self.boost.factors(overlap.numbers["shared"], overlap.numbers["unique"]))
        if block.name not in overlap.tensors.tensors:
            return RamArguments([1.0] * len(block.ids))
        counts = overlap.tensors.read(block.name).reshape(2, -1).tolist()
        return RamArguments(self.boost.factors(counts[SHARED], counts[UNIQUE]))

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: RamArguments) -> Tensor:
        """Return θ_0 plus the mean of the changes where several experts have one, else the only one (times its
        factor)."""
        changes = [torch.where(delta.abs() > self.epsilon, delta, 0.0) for delta in deltas]
        count = folded_sum([torch.where(delta.abs() > self.epsilon, 1.0, 0.0) for delta in deltas])
        joined = folded_sum(changes) / count.clamp(min=1.0)
        if arguments.factors is not None:
            boosted = [change * factor for change, factor in zip(changes, arguments.factors, strict=True)]
            joined = torch.where(count == 1.0, folded_sum(boosted), joined)
        return base + joined
