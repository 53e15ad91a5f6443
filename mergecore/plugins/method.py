"""What a method is. The file to read first.

A plug-in is its own parameters: a frozen pydantic model that refuses unknown fields. Its `name`, its `version` and its
fields are all that enters a step's key. So whatever can change the numbers is a field, and nothing else is.

    DeltaMethod   merges task vectors: merge(base, deltas, arguments)
    WeightMethod  merges weights: merge(weights, arguments)
    Method        either, or neither (a chain holds what it needs): merge_models(models, arguments)

`arguments` is a frozen dataclass of the method. The method fills it in for each tensor, from what its statistics know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, cast, final

from torch import Tensor
from typing_extensions import TypeVar

from mergecore.plugins.any_statistic import AnyStatistic
from mergecore.plugins.block import Block, Per
from mergecore.plugins.examples import Examples
from mergecore.plugins.per_tensor import PerTensor
from mergecore.plugins.plugin import Plugin
from mergecore.plugins.statistic import Statistics
from mergecore.tensors.source import TensorInfo

On = Literal["weights", "deltas", "state"]


@dataclass(frozen=True)
class NoArguments:
    """What `merge` is handed where it needs the models alone."""


A = TypeVar("A", default=Any)
"""The arguments of a method: a frozen dataclass."""


class Method(Plugin, ABC, Generic[A]):
    """A way of merging. Start from `DeltaMethod` or `WeightMethod`; derive from `Method` where neither fits."""

    per: ClassVar[Per] = Per.ELEMENT
    working: ClassVar[float] = 2.0
    """Memory that `merge` of a method that sees whole tensors needs beyond base, experts and result. The unit is the
    largest tensor in float32. It is projected before anything runs."""
    ordered: ClassVar[bool] = False
    """False: experts are folded by ascending id. True: the recipe's order holds."""
    product: ClassVar[str] = "model"
    """Name of the product that it makes (mergecore/products): a dense model, an adapter, masks …"""
    paper: ClassVar[str] = ""
    """The source, with its arXiv number where it has one."""
    published: ClassVar[tuple[str, ...]] = ()
    """Which values do as which published code, for docs/methods.md; the defaults where an entry names no values."""

    @classmethod
    def examples(cls) -> Examples:
        """Return the values that the method is tried with; the first set is the most usual one."""
        return Examples()

    @property
    @abstractmethod
    def on(self) -> On:
        """What it sees of the experts: 'weights' θ_t, 'deltas' τ_t = θ_t − θ_0, or 'state': nothing. Its statistics
        hold everything that it needs of the experts."""

    @property
    def needs_base(self) -> bool:
        """Whether it is handed the base."""
        return self.on == "deltas"

    @property
    def needs_experts(self) -> bool:
        """Whether it is handed the experts."""
        return self.on != "state"

    @property
    def needs_ids(self) -> bool:
        """Whether the numbers depend on who the experts are, as random numbers drawn by expert id do."""
        return False

    @property
    def idempotent(self) -> bool:
        """Whether experts that are all equal give that expert: to the last bit of bfloat16 and float16.

        Of float32 checkpoints an average does so too. Other methods may be off by a rounding of float32, in which they
        form deltas.
        """
        return True

    def statistics(self) -> Mapping[str, AnyStatistic]:
        """Return what the method must know beforehand, by the name under which it is handed over."""
        return {}

    def validate_count(self, count: int) -> None:
        """Raise SpecError where the method, with these values, does not take `count` experts."""

    def arranged(self, ids: Sequence[str]) -> list[int]:
        """Return the experts' positions in the order in which they are folded."""
        order = list(range(len(ids)))
        return order if self.ordered else sorted(order, key=lambda position: ids[position])

    def bound(self, order: Sequence[int]) -> Method[A]:
        """Return the method for experts in this order: values that are one per expert (weights, say) move along."""
        return self

    def fitted(self, tensors: Mapping[str, TensorInfo]) -> Method[A]:
        """Return the method with what it takes from names and shapes of the base's tensors, the number of layers say.

        Raises SpecError where its values do not fit them.
        """
        fit = {key: value.fitted(tensors, f"{self.name}.{key}") for key, value in self._layered().items()}
        return self.model_copy(update=fit) if fit else self

    @final
    def of_tensor(self, name: str) -> Method[A]:
        """Return the method for one tensor: with numbers in place of factors that go by layer, and of tables."""
        layered = self._layered()
        return self.model_copy(update={key: value.at(name) for key, value in layered.items()}) if layered else self

    def _layered(self) -> dict[str, PerTensor]:
        return {key: value for key, value in self if isinstance(value, PerTensor)}

    def outputs(self, selection: Mapping[str, TensorInfo], count: int) -> Mapping[str, TensorInfo]:
        """Return names, dtypes and shapes of what is made from the merged tensors of `count` experts."""
        return selection

    def arguments(self, block: Block, statistics: Statistics) -> A:
        """Return what `merge` needs for this block besides the models. The block has no values.

        For element-wise methods the fields are numbers, `flat_index()` and `read_beside(…)`, also in lists, tuples and
        dataclasses. Texts, bools and None may stand there too: they decide the form of the fused loop.
        """
        return cast(A, NoArguments())  # a method with a type of its own overrides this

    @abstractmethod
    def merge_models(self, models: Sequence[Tensor], arguments: A) -> Tensor:
        """Return the merged weights of one block, float32.

        models: the base where `needs_base`, then every expert where `needs_experts`, as `on` says; float32, of one
        shape.

        An element-wise method does plain torch operations on single elements, none in place and none on a number alone.
        The engine makes one fused loop of them. Where it cannot, it runs them as they are.
        """

    def merge_block(self, block: Block, statistics: Statistics) -> dict[str, Tensor]:
        """Return the merged tensors of one block, by name; of methods that see whole tensors."""
        method = self.of_tensor(block.name)
        return {block.name: method.merge_models(block.models, method.arguments(block, statistics))}


class DeltaMethod(Method[A], ABC):
    """A method on task vectors."""

    @property
    @final
    def on(self) -> On:
        return "deltas"

    @property
    @final
    def needs_base(self) -> bool:
        return True

    @final
    def merge_models(self, models: Sequence[Tensor], arguments: A) -> Tensor:
        return self.merge(models[0], models[1:], arguments)

    @abstractmethod
    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: A) -> Tensor:
        """Return the merged weights of one block, float32, from θ_0 and the τ_t (see `Method.merge_models`)."""


class WeightMethod(Method[A], ABC):
    """A method on the weights themselves."""

    @property
    @final
    def on(self) -> On:
        return "weights"

    @final
    def merge_models(self, models: Sequence[Tensor], arguments: A) -> Tensor:
        return self.merge(models, arguments)

    @abstractmethod
    def merge(self, weights: Sequence[Tensor], arguments: A) -> Tensor:
        """Return the merged weights of one block, float32 (see `Method.merge_models`).

        weights: those of every expert; where `needs_base`, the base's come first.
        """
