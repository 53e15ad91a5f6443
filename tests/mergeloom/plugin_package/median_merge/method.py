"""Median merging: the base plus the median of the task vectors."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from median_merge.statistic import LargestChange
from mergecore.plugins.block import Block
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import Method
from mergecore.plugins.statistic import Statistic, Statistics


class Median(Method):
    """The element-wise median of the experts' changes, none of which may exceed a share of the largest one."""

    name: ClassVar[str] = "median"
    version: ClassVar[int] = 2
    idempotent: ClassVar[bool] = False

    limit: Annotated[float, Field(gt=0, le=1, description="share of the largest change of a tensor")] = 1.0

    @classmethod
    def examples(cls) -> Examples:
        return Examples(golden=[{}], others=[{"limit": 0.25}])

    @property
    def on(self) -> str:
        return "deltas"

    def statistics(self) -> Mapping[str, Statistic]:
        return {"largest": LargestChange()}

    def arguments(self, block: Block, statistics: Statistics) -> dict[str, Any]:
        largest = max(float(result.tensors.read(block.name)) for result in statistics["largest"])
        return {"low": -largest * self.limit, "high": largest * self.limit}

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], **arguments: Any) -> Tensor:
        """Return θ_0 + median of τ_t, cut at ± limit; of two experts the mean, of more than three the first three's."""
        assert base is not None
        median = experts[0]
        if len(experts) > 1:
            least, most = torch.minimum(experts[0], experts[1]), torch.maximum(experts[0], experts[1])
            median = (
                (least + most) * 0.5 if len(experts) == 2 else torch.maximum(least, torch.minimum(most, experts[2]))
            )
        low, high = arguments["low"], arguments["high"]
        return base + torch.where(median > high, high, torch.where(median < low, low, median))
