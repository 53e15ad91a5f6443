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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mergecore.events import Report


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's dtype (safetensors' name: F32, BF16, F16, I64 …) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


class TensorSource(Protocol):
    """Named tensors that can be read in pieces: a checkpoint on disk, a statistic's result, a dict in memory."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by name."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None, space: Tensor | None = None) -> Tensor:
        """Elements start … stop−1 of the flattened tensor, in its own dtype; not to be written to.

        space: memory of that size and dtype that may be used for the answer.
        """
        ...


@dataclass(frozen=True)
class Index:
    """Among a method's arguments: the flat index of each element of the block, int64."""


@dataclass(frozen=True)
class Beside:
    """Among a method's arguments: one float32 per element, read beside the block from tensor `name` of `source`."""

    source: TensorSource
    name: str
    dtype: ClassVar[torch.dtype] = torch.float32

    def read(self, start: int, stop: int) -> Tensor:
        """Elements start … stop−1 of the flattened tensor."""
        return self.source.read(self.name, start, stop).to(torch.float32)


class Per(StrEnum):
    """How much a method sees at once."""

    ELEMENT = "element"
    """Any flat chunk: the engine picks the chunk, the numbers do not depend on it."""
    TENSOR = "tensor"
    """One whole tensor, in its shape."""
    LAYER = "layer"
    """All tensors of one layer."""
    MODEL = "model"
    """Everything at once."""


class Scope(StrEnum):
    """What a statistic looks at."""

    EXPERT = "expert"
    """One expert: shared by every cell that uses it."""
    POOL = "pool"
    """All experts of a merge together."""
    PREFIX = "prefix"
    """The experts so far, in the order they are folded: a chain whose links see one more expert each."""


class Plugin(BaseModel):
    """Parameters and nothing else; `name` is how a spec calls it, `version` is bumped by hand when numbers change."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    name: ClassVar[str]
    version: ClassVar[int] = 1

    def parameters(self) -> dict[str, Any]:
        """The fields as plain JSON, defaults included: what enters the step's key."""
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class Block:
    """A piece of every model: elements start … stop−1 of the flattened tensor `name`, or the whole tensor.

    base and experts are float32; for `Per.ELEMENT` of shape (stop−start,), else of the tensor's shape. `experts` holds
    what the method asked for with `on`: weights θ_t, or deltas τ_t = θ_t − θ_0. ids are the experts' ids, in the same
    order. members: for LAYER and MODEL the blocks of the single tensors, else empty. Where only the place is known (see
    `Method.arguments`) base is None and experts is empty.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    base: Tensor | None
    experts: tuple[Tensor, ...]
    ids: tuple[str, ...]
    members: tuple[Block, ...] = ()


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


class Statistic(Plugin, ABC):
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

    def statistics(self) -> Mapping[str, Statistic]:
        """What this statistic must know beforehand, by the name it is handed under."""
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


class DataStatistic(Plugin, ABC):
    """A statistic that runs the model on data (scope EXPERT): Fisher, Gram matrices, router usage."""

    scope: ClassVar[Scope] = Scope.EXPERT

    def statistics(self) -> Mapping[str, Statistic]:
        """What this statistic must know beforehand."""
        return {}

    @abstractmethod
    def compute(
        self, model: torch.nn.Module, data: Calibration, selection: Mapping[str, TensorInfo], report: Report
    ) -> Result:
        """The result for `model` (float32, eval mode) on `data`, for the tensors of the selection."""


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
    makes: ClassVar[Literal["model", "adapter", "masks"]] = "model"
    """'model'; 'adapter', of adapters (mergecore/adapters.py): a sweep measures the base plus it; or 'masks', a product from
    which the model of a task is read (mergecore/masks.py)."""
    paper: ClassVar[str] = ""
    """The source, with its arXiv number where it has one."""
    published: ClassVar[tuple[str, ...]] = ()
    """Which values do as which published code, for docs/methods.md; the defaults where an entry names no values."""

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

    def statistics(self) -> Mapping[str, Statistic | DataStatistic | Link]:
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
