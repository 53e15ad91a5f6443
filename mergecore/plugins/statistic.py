"""A statistic looks at models once and writes a few tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mergecore.identity.content import GRID
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
"""Results by the names that their owner has for them: one per expert, in order (scope EXPERT), or one (POOL)."""


@dataclass(frozen=True)
class Counts:
    """Have the bit patterns of a block counted; the counts come back in `Statistic.counted`.

    patterns(experts, **arguments) returns `results` int32 tensors, one value per element, in plain torch on flat
    float32 deltas. bins: None counts the high half-words; else, per result, the high half-words inside which the low
    half-words are counted (as many for every result).
    """

    patterns: Callable[..., Sequence[Tensor]]
    arguments: Mapping[str, Any]
    results: int = 1
    bins: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Sums:
    """Have values of a block added up; the sums come back in `Statistic.summed`.

    values(experts, **arguments) returns `results` float32 or float64 tensors, one value per element, in plain torch on
    flat float32 deltas (or weights, see `Statistic.on`). Sums are float64, in an order that no machine changes.
    with_base: the base comes first, before the experts. window: elements per sum, a divisor of a grid block; None: a
    grid block.
    """

    values: Callable[..., Sequence[Tensor]]
    arguments: Mapping[str, Any]
    results: int = 1
    with_base: bool = False
    window: int | None = None


@dataclass(frozen=True)
class Blocks:
    """Have the deltas of a block handed over, one grid block at a time, to `Statistic.add`."""


Look = Counts | Sums | Blocks
"""The three ways to look at a block."""

SparseCounts = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Occupied bins in ascending order, and their counts."""


class Statistic(AnyStatistic, ABC):
    """Looks at models and writes a few tensors: begin, look at every block, combine, finish.

    For each block `look` says how: the engine counts, adds up or hands over, and gives the outcome to `counted`,
    `summed` or `add`, which return the new state. Blocks come in any order, and `combine` joins states of different
    workers: a reduction keeps one float64 value per grid block and folds them in order in `finish`. `finish` may
    return `Rescan`: the pass then reads again, only what is named, and every span starts from that state. States are
    plain picklable data.
    """

    scope: ClassVar[Scope]
    looks: ClassVar[frozenset[type[Look]]]
    """What `look` may return; in one reading it is always the same. The memory of a pass is projected from it."""
    largest_block: ClassVar[int] = GRID
    """Elements of the largest block that `add` gets; less than a grid block where only small parts are read again."""
    whole: ClassVar[bool] = False
    """True: looks at all tensors an expert carries, whatever the selection, so that selections share it."""

    @property
    def on(self) -> Literal["weights", "deltas"]:
        """What it looks at; weights only for `Sums`."""
        return "deltas"

    @property
    def readings(self) -> int:
        """How often it reads all of the models."""
        return 1

    def visit(self, kinds: VisitsStreamed[Answer_co]) -> Answer_co:
        """Return what `kinds` has for a streamed statistic."""
        return kinds.streamed(self)

    def reported(self, numbers: Mapping[str, Any]) -> Mapping[str, float]:
        """Return what of its numbers stands in the record of a model and on its card, by name."""
        return {}

    def of_expert(self, position: int) -> Statistic:
        """Return the statistic of one expert, for scope EXPERT, where parameters are one value per expert."""
        return self

    @abstractmethod
    def begin(self, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Any:
        """Return the state before any block; `Rescan` to read only some blocks; `Result` where nothing need be read."""

    @abstractmethod
    def look(self, state: Any, block: Block, statistics: Statistics) -> Look | None:
        """Return how to look at a block, of which only the place is known; None: not at all."""

    def counted(self, state: Any, tensor: str, counts: Sequence[SparseCounts]) -> Any:
        """Return the state after `Counts` of a part of one tensor: one per result, or per result one per bin."""
        raise NotImplementedError

    def summed(self, state: Any, tensor: str, start: int, sums: Sequence[float]) -> Any:
        """Return the state after `Sums`, one per result, of the grid block (or window) from element `start` on."""
        raise NotImplementedError

    def add(self, state: Any, block: Block, statistics: Statistics) -> Any:
        """Return the state after `Blocks`: `block.experts` are flat float32 deltas, one (EXPERT) or all (POOL)."""
        raise NotImplementedError

    @abstractmethod
    def combine(self, left: Any, right: Any) -> Any:
        """Return one state from two that have seen different blocks."""

    @abstractmethod
    def finish(self, state: Any, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Result | Rescan:
        """Return the result, or the wish to read again."""


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


class VisitsStreamed(Protocol[Answer_co]):
    """Has an answer for streamed statistics."""

    def streamed(self, statistic: Statistic, /) -> Answer_co:
        """Return the answer."""
        ...
