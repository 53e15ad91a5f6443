"""A chain: model-sized state that grows by one expert per link."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from mergecore.plugins.any_statistic import AnyStatistic
from mergecore.plugins.block import Block, Per
from mergecore.plugins.statistic import Statistics
from mergecore.tensors.source import TensorInfo, TensorSource

Answer_co = TypeVar("Answer_co", covariant=True)

BEFORE = "before"
"""The name under which a link is handed the link before it."""


class Link(AnyStatistic, ABC):
    """A link of a chain: model-sized state over the experts so far. Each link is a cached step.

    A link sees the base, one expert (the newest, as a delta) and the link before it, never the earlier experts. So a
    new
    expert costs the same however many there were. Its tensors are written one by one, as a model's are.
    """

    cost: ClassVar[str] = "a chain: one of each expert that is new in it"
    chained: ClassVar[bool] = True
    shown_as: ClassVar[str] = "link of a chain"
    per: ClassVar[Per] = Per.TENSOR
    working: ClassVar[float] = 20.0
    """As `Method.working`: two matrices and the decomposition of one in float64, and the link before."""
    on: ClassVar[str] = "deltas"
    needs_base: ClassVar[bool] = False
    needs_experts: ClassVar[bool] = True

    def visit(self, kinds: VisitsLinks[Answer_co]) -> Answer_co:
        """Return what `kinds` has for a chain."""
        return kinds.chained(self)

    @abstractmethod
    def outputs(self, selection: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
        """Return names, dtypes and shapes of what is written for the tensors that the experts so far carry."""

    @abstractmethod
    def merge_block(self, block: Block, statistics: Statistics) -> dict[str, Tensor]:
        """Return what is written for one tensor. `statistics[BEFORE]` has the link before; it is empty for the first
        expert.
        """

    @abstractmethod
    def numbers(
        self, written: TensorSource, selection: Mapping[str, TensorInfo], statistics: Statistics
    ) -> dict[str, Any]:
        """Return numbers of the whole model, plain JSON, once every tensor is written."""


class VisitsLinks(Protocol[Answer_co]):
    """Has an answer for chains."""

    def chained(self, link: Link, /) -> Answer_co:
        """Return the answer."""
        ...
