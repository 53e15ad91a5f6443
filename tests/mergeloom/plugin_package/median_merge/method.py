"""Median merging: the base plus the median of the task vectors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from median_merge.statistic import LargestChange
from mergecore.plugins.block import Block
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import DeltaMethod
from mergecore.plugins.statistic import Statistic, Statistics


@dataclass(frozen=True)
class MedianArguments:
    """low, high: between these the median of a tensor is cut."""

    low: float
    high: float


class Median(DeltaMethod[MedianArguments]):
    """The element-wise median of the experts' changes, none of which may exceed a share of the largest one."""

    name: ClassVar[str] = "median"
    version: ClassVar[int] = 2

    limit: Annotated[float, Field(gt=0, le=1, description="share of the largest change of a tensor")] = 1.0

    @classmethod
    def examples(cls) -> Examples:
        return Examples(golden=[{}], others=[{"limit": 0.25}])

    @property
    def idempotent(self) -> bool:
        return False

    def statistics(self) -> Mapping[str, Statistic]:
        return {"largest": LargestChange()}

    def arguments(self, block: Block, statistics: Statistics) -> MedianArguments:
        largest = max(float(result.tensors.read(block.name)) for result in statistics["largest"])
        return MedianArguments(-largest * self.limit, largest * self.limit)

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: MedianArguments) -> Tensor:
        """Return θ_0 + median of τ_t, cut at ± limit; of two experts the mean, of more than three the first three's."""
        median = deltas[0]
        if len(deltas) > 1:
            least, most = torch.minimum(deltas[0], deltas[1]), torch.maximum(deltas[0], deltas[1])
            median = (least + most) * 0.5 if len(deltas) == 2 else torch.maximum(least, torch.minimum(most, deltas[2]))
        low, high = arguments.low, arguments.high
        return base + torch.where(median > high, high, torch.where(median < low, low, median))
