"""A statistic that runs models on data, or works on whole tensors: Fisher, Gram matrices, learned coefficients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from mergecore.errors import SpecError
from mergecore.events import Report
from mergecore.identity.keys import digest
from mergecore.plugins.any_statistic import AnyStatistic
from mergecore.plugins.statistic import Result, Scope, Statistics
from mergecore.tensors.source import TensorInfo, TensorSource

Answer_co = TypeVar("Answer_co", covariant=True)

Seen = Annotated[
    Literal["training", "validation", "test"],
    Field(description="whose items are looked at; a row that saw test items is marked transductive"),
]
Labels = Annotated[
    Literal["none", "used"], Field(description="whether right answers are looked at; none: no token of an answer is")
]


LABELS_NOT_USED = "right answers are asked for, and the plug-in says `labels: none`; write `labels: used`"
"""What a statistic is told that asks for what it does not look at."""


@dataclass(frozen=True)
class Use:
    """What a plug-in looks at: the split, how many items of each expert, whether their right answers, and the seed by
    which items are drawn.
    """

    inputs: Seen
    items: int
    labels: Labels
    seed: int

    def __str__(self) -> str:
        labels = ", labels used" if self.labels == "used" else ", no labels"
        return f"{self.items} {self.inputs} items an expert{labels}"


@dataclass(frozen=True)
class Slot:
    """Where a tensor of a checkpoint lies in a module: a parameter or buffer, or a slice of one.

    transformers keeps the experts of a mixture fused in one parameter, which checkpoints have apart.
    """

    parameter: str
    index: tuple[int | slice, ...] = ()
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of the parameter, or of its gradient, that is the checkpoint's tensor."""
        view = tensor[self.index] if self.index else tensor
        return view.mT if self.transposed else view


class Shell(Protocol):
    """A module whose weights are swapped in place, in float32 and in eval mode."""

    @property
    def module(self) -> torch.nn.Module:
        """The module."""
        ...

    def swap(self, weights: TensorSource) -> None:
        """Put weights in. Raises MismatchError for other names or shapes, NonFiniteError."""
        ...

    def slots(self, names: Iterable[str]) -> Mapping[str, Slot]:
        """Return where these tensors of the base lie in the module. Raises MismatchError for one that lies nowhere."""
        ...


class Models(Protocol):
    """The models that a statistic may read and run."""

    base: TensorSource
    experts: Sequence[TensorSource]
    """Weights θ_t under the names of the base, float32, formed while they are read; in fold order."""
    memory: int | None
    """Bytes that the statistic may take; None: whatever it takes."""
    config: Mapping[str, Any]
    """The base's config.json; empty where there is none."""

    def delta(self, expert: int, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements start … stop−1 of τ_t, flat, float32, read when asked for."""
        ...

    def shell(self, number: int = 0) -> Shell:
        """Return a shell; as many as `ModelStatistic.shells` says. It holds what was put in last, at first nothing."""
        ...


class TaskInputs(ABC):
    """The items of one task that an expert was drawn. An answer is never in what a model is shown.

    task: its name. documents: the digest of each item, as everywhere. classes: how many answers there are to choose
    from; None where the answer is open.
    """

    task: str
    documents: tuple[str, ...]
    classes: int | None

    def __len__(self) -> int:
        """Return how many items there are."""
        return len(self.documents)

    @abstractmethod
    def logits(self, model: torch.nn.Module, items: Sequence[int]) -> Tensor:
        """Return (items, classes), float32, differentiable: log p of each answer up to a constant.

        Open answers: (items, vocabulary) for the first token of the answer. Raises EvaluationError where a task has no
        answers.
        """

    @abstractmethod
    def run(self, model: torch.nn.Module, items: Sequence[int]) -> None:
        """Run the model on the inputs alone. Nothing is padded, so that hooks see tokens of the items and no others."""

    @abstractmethod
    def labels(self, items: Sequence[int]) -> Tensor:
        """Return the right class of each item, int64. Raises SpecError where the plug-in says `labels: none`."""

    def batch(self, step: int, size: int, seed: int) -> list[int]:
        """Return the `size` items with the lowest hash(seed, task, step, document): a function, and no stream."""
        drawn = sorted((digest([seed, self.task, step, name]), item) for item, name in enumerate(self.documents))
        return [item for _, item in drawn[:size]]


class Inputs(Protocol):
    """What of the data belongs to one expert."""

    @property
    def tasks(self) -> Sequence[TaskInputs]:
        """Its tasks; `items` are shared out evenly among them. They are drawn when first asked for."""
        ...

    @property
    def answered(self) -> Calibration:
        """Items whose sequences hold the right answer. Raises SpecError where the plug-in says `labels: none`."""
        ...


class Calibration(Protocol):
    """Items with their right answers, on which a model's own output distribution can be asked for."""

    def __len__(self) -> int:
        """Number of items."""
        ...

    def logits(self, model: torch.nn.Module, items: Sequence[int]) -> list[Tensor]:
        """For each of the items a (positions, classes) float32 tensor: one row per place where the model predicts.

        Where an answer has several tokens, later rows depend on the right tokens before them.
        """
        ...

    def labels(self, items: Sequence[int]) -> list[Tensor]:
        """For each of the items the true classes, shape (positions,), int64."""
        ...


class Out(Protocol):
    """Where results are written while they are worked out, so that they may be larger than memory."""

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Write elements of an output from flat index `start` on. Raises NonFiniteError, naming the tensor.

        The same may be written again: who goes on after a kill writes what was not kept.
        """
        ...


@dataclass(frozen=True)
class Kept:
    """What a statistic goes on from: how many steps are done, tensors and plain numbers."""

    step: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)


class Progress(Protocol):
    """What is kept of a statistic under way. Killed and started again, it goes on from there."""

    @property
    def last(self) -> Kept | None:
        """What was kept last; None at the beginning."""
        ...

    def keep(self, state: Callable[[], Kept]) -> None:
        """Keep a state, where the clock says that it is time. Call it after every step.

        What was written before it counts as written. The state must be all that later steps depend on.
        """
        ...


class ModelStatistic(AnyStatistic, ABC):
    """Works on runnable models and their data: of one expert (scope EXPERT), or of all of a merge together (POOL).

    Its tensors may be as large as models and are written while they are worked out. It runs on one worker, on one
    thread. `use` says what it looks at; its values are fields, so that they stand in the key.
    """

    scope: ClassVar[Scope]
    shells: ClassVar[Literal["none", "one", "each"]] = "one"
    """How many models it runs at a time: none (tensors alone), one, or one of each expert."""
    gradients: ClassVar[bool] = False
    """Whether it goes backwards through a model; its memory is projected from it."""
    own_tasks: ClassVar[bool] = True
    """Whether each expert must name tasks; else those of all experts stand for an expert without."""
    takes_data: ClassVar[bool] = True
    cost: ClassVar[str] = "which runs each expert on training items"

    @property
    @abstractmethod
    def use(self) -> Use:
        """What it looks at."""

    def handed(self, count: int) -> int:
        """Return how many results there are for `count` experts."""
        return 1 if self.scope is Scope.POOL else count

    def visit(self, kinds: VisitsOnModels[Answer_co]) -> Answer_co:
        """Return what `kinds` has for a statistic on models."""
        return kinds.on_models(self)

    @abstractmethod
    def outputs(
        self, selection: Mapping[str, TensorInfo], count: int, config: Mapping[str, Any]
    ) -> Mapping[str, TensorInfo]:
        """Return names, dtypes and shapes of what is written, before anything runs.

        count: of the experts. config: the base's config.json; empty where there is none.
        """

    def memory(self, selection: Mapping[str, TensorInfo], count: int) -> int:
        """Return the bytes that it takes at a time, at most; they limit how many run at once."""
        shells = {"none": 0, "one": 1, "each": count}[self.shells] + self.gradients
        return shells * sum(4 * info.count for info in selection.values())

    @abstractmethod
    def compute(
        self,
        models: Models,
        inputs: Sequence[Inputs],
        selection: Mapping[str, TensorInfo],
        statistics: Statistics,
        out: Out,
        progress: Progress,
        report: Report,
    ) -> Mapping[str, Any]:
        """Write every output and return the numbers, plain JSON.

        models, inputs: of the one expert, or of all, in fold order. Killed at any moment and started again, the result
        must be the same: what a step does depends on `progress.last` and on nothing else that changes.
        """

    def noted(self, numbers: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what of its numbers stands in the record of a model and on its card, by name; plain JSON.

        What stands under `warnings`, a list of sentences, is said aloud too.
        """
        return {}

    def taken(self, tensors: Mapping[str, Tensor], selection: Mapping[str, TensorInfo]) -> Result:
        """Return the result whose tensors were worked out elsewhere. Raises SpecError where one is missing."""
        missing = sorted(set(self.outputs(selection, 1, {})) - set(tensors))
        if missing:
            raise SpecError(f"statistics: nothing given for tensor '{missing[0]}' and {len(missing) - 1} more")
        return Result(tensors=tensors, numbers={})


class VisitsOnModels(Protocol[Answer_co]):
    """Has an answer for statistics on models."""

    def on_models(self, statistic: ModelStatistic, /) -> Answer_co:
        """Return the answer."""
        ...
