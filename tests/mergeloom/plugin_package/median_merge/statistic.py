"""The largest change of each tensor."""

from collections.abc import Mapping
from typing import ClassVar

import torch

from mergecore.plugins.block import Block
from mergecore.plugins.statistic import Blocks, Look, Result, Scope, Statistic, Statistics
from mergecore.tensors.source import TensorInfo

Largest = dict[str, float]


class LargestChange(Statistic):
    """Per tensor max |τ|, float32."""

    name: ClassVar[str] = "largest_change"
    version: ClassVar[int] = 1
    scope: ClassVar[Scope] = Scope.EXPERT
    looks: ClassVar[frozenset[type[Look]]] = frozenset({Blocks})

    def begin(self, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Largest:
        return dict.fromkeys(selection, 0.0)

    def look(self, state: Largest, block: Block, statistics: Statistics) -> Look:
        return Blocks()

    def add(self, state: Largest, block: Block, statistics: Statistics) -> Largest:
        (change,) = block.experts
        return state | {block.name: max(state[block.name], float(change.abs().max()) if change.numel() else 0.0)}

    def combine(self, left: Largest, right: Largest) -> Largest:
        return {name: max(left[name], right[name]) for name in left}

    def finish(self, state: Largest, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Result:
        return Result({name: torch.tensor([value]) for name, value in state.items()}, {})
