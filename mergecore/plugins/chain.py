"""A chain: model-sized state that grows by one expert per link."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from mergecore.plugins.block import Block, Per
from mergecore.plugins.plugin import Plugin
from mergecore.plugins.statistic import Scope, Statistics
from mergecore.tensors.source import TensorInfo, TensorSource

BEFORE = "before"
"""The name under which a link is handed the link before it."""


class Link(Plugin, ABC):
    """What the experts so far have come to, as large as a model: a chain of cached steps, one link for each expert.

    A link sees the base, one expert (the newest, as a delta) and the link before it, never the earlier experts: what an
    arrival costs does not grow with how many there were. Its tensors are written one by one, as a model's are.
    """

    scope: ClassVar[Scope] = Scope.PREFIX
    per: ClassVar[Per] = Per.TENSOR
    working: ClassVar[float] = 20.0
    """As `Method.working`: two matrices and the decomposition of one in float64, and the link before."""
    makes: ClassVar[Literal["state"]] = "state"
    on: ClassVar[str] = "deltas"
    needs_base: ClassVar[bool] = False
    needs_experts: ClassVar[bool] = True

    @abstractmethod
    def outputs(self, selection: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
        """Names, dtypes and shapes of what is written for the tensors that the experts so far carry."""

    @abstractmethod
    def merge_block(self, block: Block, statistics: Statistics) -> dict[str, Tensor]:
        """What is written for one tensor; `statistics[BEFORE]` holds the link before, nothing for the first expert."""

    @abstractmethod
    def numbers(
        self, written: TensorSource, selection: Mapping[str, TensorInfo], statistics: Statistics
    ) -> dict[str, Any]:
        """What is known once every tensor is written: numbers of the whole model that fit into JSON."""
