"""The plug-in kinds: what a method, a statistic and an evaluator are. The file to read first.

A plug-in is its own parameters: a frozen pydantic model that refuses unknown fields. Its `name` and `version` and its
fields are all that enters a step's key, so whatever can change the numbers is a field and nothing else is.

    Method     turns a base and experts into tensors of one model     merge(base, experts, …)
    Statistic  looks at models once and writes a few tensors          streamed: begin · add · combine · finish
                                                                      with data: compute(model, data)
    Link       what a chain of experts has come to, model-sized       merge_block · numbers
    Evaluator  scores one model on one task                           (mergecore/evaluators)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from mergecore.plugins.any_statistic import AnyStatistic
from mergecore.plugins.block import Block, Per
from mergecore.plugins.examples import Examples
from mergecore.plugins.plugin import Plugin
from mergecore.plugins.statistic import Statistics
from mergecore.tensors.source import TensorInfo


class Method(Plugin, ABC):
    """A way of merging. An element-wise or per-tensor method writes only `merge`."""

    per: ClassVar[Per] = Per.ELEMENT
    working: ClassVar[float] = 2.0
    """Memory that `merge` of a method that sees whole tensors needs beyond base, experts and result, in float32 tensors of
    the largest one's size: what is projected before anything runs."""
    ordered: ClassVar[bool] = False
    """False: a sum without order, experts are folded by ascending id. True: the recipe's order holds."""
    idempotent: ClassVar[bool] = True
    """Experts that are all equal to e give e (with the method's neutral values)."""
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
    def on(self) -> str:
        """'weights' (θ_t, no base needed), 'deltas' (τ_t = θ_t − θ_0) or 'state' (what its statistics hold of them)."""

    @property
    def needs_base(self) -> bool:
        """Whether the numbers depend on the base."""
        return self.on == "deltas"

    @property
    def needs_experts(self) -> bool:
        """Whether blocks show the experts. Where the statistics hold all of them that counts they are not read again."""
        return self.on != "state"

    @property
    def needs_ids(self) -> bool:
        """Whether the numbers depend on who the experts are: random numbers are drawn by expert id."""
        return getattr(self, "drop", None) is not None

    def statistics(self) -> Mapping[str, AnyStatistic]:
        """What the method must know beforehand, by the name it is handed under."""
        return {}

    def validate_count(self, count: int) -> None:
        """Raise SpecError where the parameters (weights, say) do not fit `count` experts."""

    def arranged(self, ids: Sequence[str]) -> list[int]:
        """Positions of the experts in the order in which they are folded: by ascending id, or as the recipe has them."""
        order = list(range(len(ids)))
        return order if self.ordered else sorted(order, key=lambda position: ids[position])

    def bound(self, order: Sequence[int]) -> Method:
        """The same method with per-expert parameters (weights, say) moved along when experts are reordered."""
        return self

    def fitted(self, tensors: Iterable[str]) -> Method:
        """The same method with what it takes from the names of the base's tensors (how many layers there are) filled in.
        Raises SpecError where its values do not fit them."""
        return self

    def outputs(self, selection: Mapping[str, TensorInfo], count: int) -> Mapping[str, TensorInfo]:
        """Names and shapes of what is made from the merged tensors of `count` experts; the same unless the method changes
        widths, or makes no model."""
        return selection

    def arguments(self, block: Block, statistics: Statistics) -> dict[str, Any]:
        """What `merge` needs for this block besides base and experts.

        An element-wise method is given the place alone (no base, no experts) and answers with numbers, `Index` and
        `Beside`, in lists, tuples or dicts; texts, bools and None decide the form of `merge`. Others may look at values.
        """
        return {}

    @abstractmethod
    def merge(self, base: Tensor | None, experts: Sequence[Tensor], **arguments: Any) -> Tensor:
        """The merged weights of one block, float32, from `base` (None where it is not needed) and `experts`.

        Of an element-wise method plain torch operations on single elements, none in place and none on a number alone: the
        engine makes one fused loop of them, and runs them as they are where it cannot.
        """

    def merge_block(self, block: Block, statistics: Statistics) -> dict[str, Tensor]:
        """The merged tensors of one block, by name."""
        return {block.name: self.merge(block.base, block.experts, **self.arguments(block, statistics))}
