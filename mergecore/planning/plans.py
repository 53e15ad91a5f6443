"""What a plan consists of: one statistic, one merge, each with its step and all that must be known for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from mergecore.checkpoints.layout import Layout
from mergecore.identity.keys import Step
from mergecore.plugins.adapter_method import ADAPTER, AdapterMethod
from mergecore.plugins.chain import Link
from mergecore.plugins.method import Method
from mergecore.plugins.statistic import DataStatistic, Statistic
from mergecore.tensors.source import TensorInfo


@dataclass(frozen=True)
class StatisticPlan:
    """One statistic of some experts over a selection, or the adapter that a method makes of adapters.

    experts: ids in fold order; of a link, the newest alone.
    """

    step: Step
    statistic: Statistic | DataStatistic | Link | AdapterMethod
    experts: tuple[str, ...]
    selection: Mapping[str, TensorInfo]
    inputs: Mapping[str, tuple[StatisticPlan, ...]]
    tasks: tuple[str, ...] = ()
    base: str = ""
    """Id of the expert whose weights the changes are counted from; '' for the pool's base."""

    def with_inputs(self) -> Iterator[StatisticPlan]:
        """Everything that must be known for it, deepest first, itself last."""
        for plans in self.inputs.values():
            for plan in plans:
                yield from plan.with_inputs()
        yield self

    def missing(self, at_hand: Callable[[StatisticPlan], bool]) -> Iterator[StatisticPlan]:
        """What must be worked out to have it, deepest first, itself last; behind one that is at hand nobody looks."""
        if not at_hand(self):
            for plans in self.inputs.values():
                for plan in plans:
                    yield from plan.missing(at_hand)
            yield self

    def written(self) -> MergePlan:
        """A link of a chain as what it is to the engine: tensors made from tensors, written like a model's."""
        assert isinstance(self.statistic, Link)
        outputs = self.statistic.outputs(self.selection)
        layout = Layout(self.selection, {}, {})
        return MergePlan(self.step, self.statistic, self.experts, layout, outputs, self.inputs, bytes_of(outputs))


@dataclass(frozen=True)
class MergePlan:
    """One model: the method with its parameters in fold order, and what it must know beforehand.

    Where rules of `select` have tensors made in other ways, `parts` says how each of them comes about, `method` is the
    recipe's, and layout, outputs and statistics are those of all parts together.
    """

    step: Step
    method: Method | Link
    experts: tuple[str, ...]
    layout: Layout
    outputs: Mapping[str, TensorInfo]
    statistics: Mapping[str, tuple[StatisticPlan, ...]]
    size: int
    """Bytes of the written model."""
    base: str = ""
    """Id of the expert that stands for the base, from which copies come too; '' for the pool's base."""
    parts: tuple[MergePlan, ...] = ()

    @property
    def ways(self) -> tuple[MergePlan, ...]:
        """What is to be done: the parts, or this as a whole."""
        return self.parts or (self,)

    @property
    def product(self) -> Step:
        """The step whose result is published: the model, or the adapter that was only put onto the base to be measured."""
        return self.statistics[ADAPTER][0].step if isinstance(self.method, AdapterMethod) else self.step

    def missing(self, at_hand: Callable[[StatisticPlan], bool]) -> Iterator[StatisticPlan]:
        """What must still be worked out for it, what others need before them; some may be named twice."""
        for plans in self.statistics.values():
            for plan in plans:
                yield from plan.missing(at_hand)

    @cached_property
    def needed(self) -> tuple[StatisticPlan, ...]:
        """Everything that must be known for it, each once, what others need before them."""
        found = {
            one.step.key: one for plans in self.statistics.values() for plan in plans for one in plan.with_inputs()
        }
        return tuple(found.values())


def steps_of(inputs: Mapping[str, tuple[StatisticPlan, ...]]) -> dict[str, list[Step]]:
    """Return the steps of planned statistics, by the name under which each is handed on."""
    return {name: [plan.step for plan in plans] for name, plans in inputs.items()}


def bytes_of(tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of so many tensors."""
    return sum(info.size for info in tensors.values())
