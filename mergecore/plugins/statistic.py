"""A statistic looks at models once and writes a few tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergecore.events import Report
from mergecore.plugins.any_statistic import AnyStatistic
from mergecore.plugins.block import Block
from mergecore.tensors.source import TensorInfo, TensorSource

Answer_co = TypeVar("Answer_co", covariant=True)


class Scope(StrEnum):
    """What a statistic looks at."""

    EXPERT = "expert"
    """One expert: shared by every cell that uses it."""
    POOL = "pool"
    """All experts of a merge together."""


@dataclass(frozen=True)
class Found:
    """What a statistic found: a few tensors by name, and numbers that fit into JSON."""

    tensors: TensorSource
    numbers: Mapping[str, Any]


Statistics = Mapping[str, Sequence[Found]]
"""By the name the method gave it: one `Found` per expert (scope EXPERT, in the experts' order) or a single one (POOL)."""


@dataclass(frozen=True)
class Counting:
    """What a scan counts of one block: patterns(experts, **arguments) gives int32 values, one or more per element, in plain
    torch on flat float32 deltas. windows: None: counts their high half-words; else, per result, the low half-words inside
    each of these high ones (as many for every result; none at all: nothing is counted).
    """

    patterns: Callable[..., Sequence[Tensor]]
    arguments: Mapping[str, Any]
    results: int = 1
    windows: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Summing:
    """What a scan adds up of one block: values(experts, **arguments) gives float32 or float64 values, one or more per element,
    in plain torch on flat float32 deltas (or what else the statistic is `on`); their sums are float64, formed in one order
    whatever runs it. with_base: the base comes first, before the experts. grain: elements whose sums are handed over
    together, a divisor of the grid's blocks; None: a block.
    """

    values: Callable[..., Sequence[Tensor]]
    arguments: Mapping[str, Any]
    results: int = 1
    with_base: bool = False
    grain: int | None = None


Sparse = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Occupied bins in ascending order, and their counts."""


class Statistic(AnyStatistic, ABC):
    """Looks at models and writes a few tensors: begin, then add for every block, combine, finish.

    `add` sees `Block`s whose `experts` are deltas: one expert for scope EXPERT, all for POOL, and returns the new
    state; blocks come in any order and states of different workers are joined by `combine`, so a reduction keeps one
    float64 value per block and folds them in order in `finish`. `finish` may return `Rescan`: the pass then reads
    again, only what is named, every span starting from the state given. States are plain picklable data.

    A scan that only counts bit patterns says so with `counting`, one that only adds up with `summing`; the engine then does
    it in one fused loop and hands over the counts (`counted`) or the sums (`summed`) instead of calling `add`.
    """

    scope: ClassVar[Scope]
    whole: ClassVar[bool] = False
    """True: looks at all tensors an expert carries, whatever the selection, so that selections share it."""

    @property
    def on(self) -> Literal["weights", "deltas"]:
        """What it looks at; weights only where it adds up."""
        return "deltas"

    @property
    def readings(self) -> int:
        """How often it reads the models, counting its wishes to read all of them again."""
        return 1

    def visit(self, kinds: VisitsStreamed[Answer_co]) -> Answer_co:
        """Return what `kinds` has for a streamed statistic."""
        return kinds.streamed(self)

    def reported(self, numbers: Mapping[str, Any]) -> Mapping[str, float]:
        """Return what of its numbers stands in the record of a model and on its card, by name."""
        return {}

    def of_expert(self, position: int) -> Statistic:
        """For scope EXPERT: the statistic of the expert at this place, where parameters are one value per expert."""
        return self

    @abstractmethod
    def begin(self, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Any:
        """The empty state for the tensors that are merged and counted; with it the wish to read only some of their blocks
        (`Rescan`), or the result, where nothing has to be read."""

    def counting(self, state: Any, block: Block, statistics: Statistics) -> Counting | None:
        """What this scan counts of the block (of which only the place is known); None where it has to `add` it."""
        return None

    def counted(self, state: Any, tensor: str, counts: Sequence[Sparse]) -> Any:
        """The state after counts of a part of one tensor: per result one of high half-words, or one per window."""
        raise NotImplementedError

    def summing(self, state: Any, block: Block, statistics: Statistics) -> Summing | None:
        """What this scan adds up of the block (of which only the place is known); None where it does something else."""
        return None

    def summed(self, state: Any, tensor: str, start: int, sums: Sequence[float]) -> Any:
        """The state after the sums, one per result, over the block (of the grid, or a grain) that starts there."""
        raise NotImplementedError

    def add(self, state: Any, block: Block, statistics: Statistics) -> Any:
        """The state after one more block; not called for a scan that only counts or adds up."""
        raise NotImplementedError

    @abstractmethod
    def combine(self, left: Any, right: Any) -> Any:
        """One state from two that have seen different blocks."""

    @abstractmethod
    def finish(self, state: Any, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Result | Rescan:
        """The result, or a wish to read again."""


@dataclass(frozen=True)
class Result:
    """A finished statistic: tensors by name (float32, float64 or int64) and numbers that fit into JSON."""

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


@dataclass(frozen=True)
class Rescan:
    """Read again with this state. parts: only these of tensors (name, first element, end), and perhaps others beside;
    None: all of the selection."""

    state: Any
    parts: tuple[tuple[str, int, int], ...] | None = None


class DataStatistic(AnyStatistic, ABC):
    """A statistic that runs the model on data (scope EXPERT): Fisher, Gram matrices, router usage."""

    cost: ClassVar[str] = "which runs each expert on training items"

    if TYPE_CHECKING:  # declared by every statistic, at the place among its fields where it stands on pages
        samples: int  # items that it looks at
        seed: int

    def visit(self, kinds: VisitsOnModels[Answer_co]) -> Answer_co:
        """Return what `kinds` has for a statistic that runs models on data."""
        return kinds.on_models(self)

    @abstractmethod
    def taken(self, tensors: Mapping[str, Tensor], selection: Mapping[str, TensorInfo]) -> Result:
        """Return the result whose tensors were worked out elsewhere. Raises SpecError where one is missing."""

    @abstractmethod
    def compute(
        self, model: torch.nn.Module, data: Calibration, selection: Mapping[str, TensorInfo], report: Report
    ) -> Result:
        """The result for `model` (float32, eval mode) on `data`, for the tensors of the selection."""


class Calibration(Protocol):
    """Items on which a model's own output distribution can be asked for."""

    def __len__(self) -> int:
        """Number of items."""
        ...

    def logits(self, model: torch.nn.Module, items: Sequence[int]) -> list[Tensor]:
        """For each of the items a (positions, classes) float32 tensor: one row per place where the model predicts."""
        ...

    def labels(self, items: Sequence[int]) -> list[Tensor]:
        """For each of the items the true classes, shape (positions,), int64."""
        ...


class VisitsStreamed(Protocol[Answer_co]):
    """Has an answer for streamed statistics."""

    def streamed(self, statistic: Statistic, /) -> Answer_co:
        """Return the answer."""
        ...


class VisitsOnModels(Protocol[Answer_co]):
    """Has an answer for statistics that run models on data."""

    def on_models(self, statistic: DataStatistic, /) -> Answer_co:
        """Return the answer."""
        ...
