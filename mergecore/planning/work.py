"""A work is one planned step: what it needs, what it costs, and how it is carried out.

The planner wraps every planned plug-in once. Whoever schedules, projects or runs steps asks the work and never looks at
the plug-in's kind.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from mergecore.checkpoints.layout import Layout
from mergecore.identity.keys import Step
from mergecore.plugins.adapter_method import AdapterMethod
from mergecore.plugins.chain import BEFORE, Link
from mergecore.plugins.method import Method
from mergecore.plugins.model_statistic import ModelStatistic, Use
from mergecore.plugins.product import Product
from mergecore.plugins.statistic import Found, Statistic
from mergecore.store.results import TENSORS
from mergecore.tensors.files import open_file
from mergecore.tensors.sinks import Shard, plan_shards
from mergecore.tensors.source import TensorInfo, stored_as

Results = Callable[[Step], Found]
"""Reads the result of a step."""


class Lane(StrEnum):
    """How works are carried out: those of one lane go together (see `mergecore.execution.lanes`)."""

    SCAN = "scan"
    """Statistics, completed in one reading of the models."""
    WRITE = "write"
    """Models and links of chains, written in one reading of the models."""
    MODELS = "models"
    """Each on one worker, which runs models on data."""
    ADAPTERS = "adapters"
    """Each on one worker, which reads adapters only."""


@dataclass(frozen=True)
class Way:
    """How tensors of a model come about: `method` makes those of `layout.merged` from `experts`, the rest is copied.

    experts: ids in fold order. base: id of the expert that stands for the base; '' for the pool's base.
    """

    step: Step
    method: Method | Link
    experts: tuple[str, ...]
    layout: Layout
    outputs: Mapping[str, TensorInfo]
    inputs: Mapping[str, tuple[Work, ...]]
    base: str = ""


@dataclass(frozen=True)
class Work(ABC):
    """One planned step. `inputs`: the works whose results it is handed, by the name it knows them under.

    experts: ids in fold order; of a link the newest alone. base: id of the expert whose weights the changes are counted
    from; '' for the pool's base.
    """

    step: Step
    experts: tuple[str, ...]
    selection: Mapping[str, TensorInfo]
    inputs: Mapping[str, tuple[Work, ...]]
    base: str

    @property
    @abstractmethod
    def lane(self) -> Lane:
        """How it is carried out."""

    @property
    @abstractmethod
    def shown_as(self) -> str:
        """What one of its kind is called in logs and on pages: 'task vector', 'statistic', 'merged model'."""

    # --- what it costs --------------------------------------------------------------------------------------------

    @property
    def reads(self) -> frozenset[str]:
        """Names of the tensors that it reads of base and full checkpoints."""
        return frozenset(self.selection)

    @property
    def size(self) -> int:
        """Bytes of the tensors that it writes, where they are as large as a model; else 0."""
        return 0

    @property
    def scans(self) -> tuple[Statistic, ...]:
        """The statistics whose scans it takes memory for."""
        return ()

    @property
    def ways(self) -> tuple[Way, ...]:
        """How the tensors that it writes come about; none where it writes no model's."""
        return ()

    @property
    def read_beside(self) -> bool:
        """Whether its result is as large as the models and read beside them, window by window."""
        return False

    @property
    def goes_on(self) -> bool:
        """Whether a work to come may start from it: a link of a chain, which stays until the chain has gone on."""
        return False

    @property
    def passed_on(self) -> tuple[Work, ...]:
        """Works that it started from; nobody needs their bytes once this one is done."""
        return ()

    @property
    def use(self) -> Use | None:
        """What of the data it looks at; None: it sees weights alone."""
        return None

    @property
    def tasks_seen(self) -> tuple[tuple[str, ...], ...]:
        """The tasks of each expert whose items it looks at."""
        return ()

    # --- what it leaves -------------------------------------------------------------------------------------------

    def reported(self, numbers: Mapping[str, Any]) -> Mapping[str, float]:
        """Return what of its numbers stands in the record of the model that it is for, by name."""
        return {}

    def noted(self, numbers: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what was learned for the model that it is for, as it stands in the model's record."""
        return {}

    # --- what must be known for it ---------------------------------------------------------------------------------

    def with_inputs(self) -> Iterator[Work]:
        """Yield everything that must be known for it, deepest first, itself last."""
        for works in self.inputs.values():
            for work in works:
                yield from work.with_inputs()
        yield self

    def missing(self, at_hand: Callable[[Work], bool]) -> Iterator[Work]:
        """Yield what must be worked out to have it, deepest first, itself last; what is at hand needs nothing."""
        if not at_hand(self):
            yield from self.missing_inputs(at_hand)
            yield self

    def missing_inputs(self, at_hand: Callable[[Work], bool]) -> Iterator[Work]:
        """Yield the missing works that this one needs, each after the works that it needs; a work may come twice."""
        for works in self.inputs.values():
            for work in works:
                yield from work.missing(at_hand)

    @cached_property
    def needed(self) -> tuple[Work, ...]:
        """All works that this one needs, each once, and each after the works that it needs itself."""
        works = {
            needed.step.key: needed for group in self.inputs.values() for work in group for needed in work.with_inputs()
        }
        return tuple(works.values())


@dataclass(frozen=True)
class ScanWork(Work):
    """A statistic that is streamed: read in a pass, block by block."""

    statistic: Statistic

    @property
    def lane(self) -> Lane:
        return Lane.SCAN

    @property
    def shown_as(self) -> str:
        return self.statistic.shown_as

    @property
    def scans(self) -> tuple[Statistic, ...]:
        return (self.statistic,)

    def reported(self, numbers: Mapping[str, Any]) -> Mapping[str, float]:
        return self.statistic.reported(numbers)


@dataclass(frozen=True)
class ModelWork(Work):
    """A statistic on models. tasks: those of each expert, in fold order. config: the base's config.json."""

    statistic: ModelStatistic
    tasks: tuple[tuple[str, ...], ...]
    config: Mapping[str, Any]

    @cached_property
    def outputs(self) -> Mapping[str, TensorInfo]:
        """Every tensor that is written."""
        return self.statistic.outputs(self.selection, len(self.experts), self.config)

    @property
    def lane(self) -> Lane:
        return Lane.MODELS

    @property
    def shown_as(self) -> str:
        return self.statistic.shown_as

    @property
    def size(self) -> int:
        return bytes_of(self.outputs)

    @property
    def read_beside(self) -> bool:
        return True

    @property
    def use(self) -> Use:
        return self.statistic.use

    def noted(self, numbers: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.statistic.noted(numbers)

    @property
    def tasks_seen(self) -> tuple[tuple[str, ...], ...]:
        return self.tasks


@dataclass(frozen=True)
class LinkWork(Work):
    """A link of a chain: model-sized state, written like a model."""

    link: Link

    @property
    def lane(self) -> Lane:
        return Lane.WRITE

    @property
    def shown_as(self) -> str:
        return self.link.shown_as

    @property
    def size(self) -> int:
        return bytes_of(self.outputs)

    @cached_property
    def outputs(self) -> Mapping[str, TensorInfo]:
        """Every tensor that is written."""
        return self.link.outputs(self.selection)

    @property
    def ways(self) -> tuple[Way, ...]:
        layout = Layout(self.selection, {}, {})
        return (Way(self.step, self.link, self.experts, layout, self.outputs, self.inputs),)

    @property
    def goes_on(self) -> bool:
        return True

    @property
    def passed_on(self) -> tuple[Work, ...]:
        return self.inputs[BEFORE]

    def shards(self, size: int) -> list[Shard]:
        """Return the one file that a link is written to, as every statistic is."""
        return plan_shards(self.outputs, sys.maxsize, Path(TENSORS).stem)

    def record(self, folder: Path, digests: Mapping[str, str], results: Results) -> dict[str, Any]:
        """Return the numbers of the link, once every tensor lies in `folder`."""
        known = {name: [results(work.step) for work in works] for name, works in self.inputs.items()}
        return dict(self.link.numbers(open_file(folder / TENSORS), self.selection, known))


@dataclass(frozen=True)
class AdapterWork(Work):
    """An adapter that a method makes of adapters."""

    method: AdapterMethod

    @property
    def lane(self) -> Lane:
        return Lane.ADAPTERS

    @property
    def shown_as(self) -> str:
        return "adapter"

    @property
    def reads(self) -> frozenset[str]:
        return frozenset()  # adapters only, whose files are counted as they are


@dataclass(frozen=True)
class MergeWork(Work):
    """One model: the method with its parameters in fold order, and what it must know beforehand.

    Where rules of `select` have tensors made in other ways, `parts` says how each of them comes about, `method` is the
    recipe's, and layout, outputs and inputs are those of all parts together. written: bytes of the model.
    """

    method: Method
    product: Product
    layout: Layout
    outputs: Mapping[str, TensorInfo]
    written: int
    parts: tuple[Way, ...] = ()

    @property
    def lane(self) -> Lane:
        return Lane.WRITE

    @property
    def shown_as(self) -> str:
        return "merged model"

    @property
    def reads(self) -> frozenset[str]:
        return frozenset((*self.layout.merged, *self.layout.copied))

    @property
    def size(self) -> int:
        return self.written

    @property
    def ways(self) -> tuple[Way, ...]:
        whole = Way(self.step, self.method, self.experts, self.layout, self.outputs, self.inputs, self.base)
        return self.parts or (whole,)

    @property
    def model(self) -> dict[str, TensorInfo]:
        """The tensors of a dense model of it, as they are given out; of masks, those of one task's model."""
        tensors = {**self.layout.merged, **self.layout.copied}
        return stored_as(dict(sorted(tensors.items())), self.step.parameters["dtype"])

    def shards(self, size: int) -> list[Shard]:
        """Return the files of the model, each of `size` bytes at most."""
        return plan_shards(self.outputs, size)

    def record(self, folder: Path, digests: Mapping[str, str], results: Results) -> dict[str, Any]:
        """Return what is recorded of the model: its tensors, its bytes, what was left out, what statistics report."""
        tensors = {name: [info.dtype, list(info.shape), digests[name]] for name, info in sorted(self.outputs.items())}
        reported: dict[str, dict[str, float]] = {}
        learned: dict[str, Any] = {}
        for work in () if self.parts else (work for works in self.inputs.values() for work in works):
            numbers = results(work.step).numbers
            for name, value in work.reported(numbers).items():
                reported.setdefault(name, {})[work.experts[0]] = value
            learned |= work.noted(numbers)
        told = {**reported, **({"learned": learned} if learned else {})}
        return {"tensors": tensors, "bytes": self.size, "dropped": dict(self.layout.dropped), **told}

    @property
    def published(self) -> Work:
        """The work whose result is published: the model, or the adapter that was only put onto the base to measure
        it.
        """
        name = self.product.published_input
        return self.inputs[name][0] if name else self


def bytes_of(tensors: Mapping[str, TensorInfo]) -> int:
    """Return the bytes that these tensors take."""
    return sum(info.size for info in tensors.values())
