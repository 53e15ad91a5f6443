"""Methods that make one adapter of several."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

from torch import Tensor

from mergecore.checkpoints.adapters import EMPTY, LowRank, low_rank, module_of, own_factor
from mergecore.checkpoints.experts import AdapterExpert
from mergecore.plugins.any_statistic import AnyStatistic
from mergecore.plugins.block import Block, Per
from mergecore.plugins.method import Method, On
from mergecore.plugins.statistic import Statistics
from mergecore.tensors.source import TensorInfo

Answer_co = TypeVar("Answer_co", covariant=True)

Updates = Sequence[LowRank | None]
"""What every adapter changes of one module, in fold order; None for an adapter that lacks the module."""
Walk = Callable[[], Iterator[tuple[str, Updates]]]
"""Reads all modules once, in the order of their names: (base tensor, its updates)."""
ADAPTER = "adapter"
"""The name under which a method's dense model is handed the adapter."""


@dataclass(frozen=True)
class Combined:
    """One module of the adapter that is made: up @ down, and numbers to record (squared norms, so that they add up)."""

    down: Tensor
    up: Tensor
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class AdapterDelta:
    """What the adapter changes of one tensor, float32, in the tensor's shape."""

    delta: Tensor


class AdapterMethod(Method[AdapterDelta], ABC):
    """A method whose experts are adapters and whose result is an adapter, made module by module from their factors.

    A recipe writes the adapter. A sweep measures models: there the result is the base plus the adapter.
    """

    product: ClassVar[str] = "adapter"
    per: ClassVar[Per] = Per.TENSOR

    @property
    def on(self) -> On:
        return "state"

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def idempotent(self) -> bool:
        return False

    def statistics(self) -> Mapping[str, AnyStatistic]:
        """Return the adapter, which its dense model is handed."""
        return {ADAPTER: MadeAdapter(method=self)}

    @abstractmethod
    def rank_made(self, module: str, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return the rank of a module's update in the result. ranks: of the adapters that have it. shape: (out, in)."""

    @abstractmethod
    def combined(self, module: str, updates: Updates) -> Combined:
        """Return one module of the result, float64, of the rank announced."""

    def combined_all(self, walk: Walk) -> Iterator[tuple[str, Combined]]:
        """Yield (base tensor, its combined module) for every module, one at a time.

        A method overrides this where a module depends on the others. It may walk several times.
        """
        for target, updates in walk():
            yield target, self.combined(module_of(target), updates)

    def total(self, modules: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return numbers of the whole adapter. modules: {base tensor: its numbers}."""
        return {}

    def arguments(self, block: Block, statistics: Statistics) -> AdapterDelta:
        """Return the adapter's delta of the tensor."""
        adapter = statistics[ADAPTER][0]
        factor = own_factor(block.name, adapter.numbers["fan_in_fan_out"], adapter.numbers.get("names", EMPTY))
        shapes = {block.name: (block.shape[0], block.shape[1])}
        view = AdapterExpert("", self.name, adapter.tensors, {block.name: factor}, shapes)
        return AdapterDelta(view.block(block.name, block.start, block.stop).view(block.shape))

    def merge_models(self, models: Sequence[Tensor], arguments: AdapterDelta) -> Tensor:
        """Return θ_0 plus the adapter's delta."""
        (base,) = models
        return base + arguments.delta.to(base.device)


def ranks_made(
    method: AdapterMethod, experts: Sequence[AdapterExpert], selection: Mapping[str, TensorInfo]
) -> dict[str, int]:
    """Return {base tensor: rank} of the adapter that the method makes. Raise SpecError where a value does not fit."""
    ranks = {}
    for target, info in selection.items():
        factors = [(expert.stored.tensors, expert.factors[target]) for expert in experts if target in expert.factors]
        shape = (info.shape[1], info.shape[0]) if factors[0][1].transposed else (info.shape[0], info.shape[1])
        ranks[target] = method.rank_made(
            module_of(target), [tensors[factor.down].shape[0] for tensors, factor in factors], shape
        )
    return ranks


def combined_modules(
    method: AdapterMethod, experts: Sequence[AdapterExpert], selection: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, Combined]]:
    """Yield (base tensor, its combined module) for every selected tensor, one at a time."""

    def walk() -> Iterator[tuple[str, Updates]]:
        for target in sorted(selection):
            yield target, [low_rank(expert, target) for expert in experts]

    yield from method.combined_all(walk)


class MadeAdapter(AnyStatistic):
    """The adapter that a method makes, as a statistic that its dense model must know beforehand."""

    name: ClassVar[str] = "adapter"
    shown_as: ClassVar[str] = "adapter"
    registered: ClassVar[bool] = False
    method: AdapterMethod

    def visit(self, kinds: VisitsAdapters[Answer_co]) -> Answer_co:
        """Return what `kinds` has for an adapter that is made."""
        return kinds.adapter(self.method)


class VisitsAdapters(Protocol[Answer_co]):
    """Has an answer for adapters that are made of adapters."""

    def adapter(self, method: AdapterMethod, /) -> Answer_co:
        """Return the answer."""
        ...
